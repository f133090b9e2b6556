package metrics

import (
	"os"
	"regexp"
	"strings"
	"testing"
)

// What dashboard and alerts ask for is there, and the dashboard shows every way in
// which something is lost before it is seen (I6).
func TestMonitoring(t *testing.T) {
	names := regexp.MustCompile(`\bportcullis_[a-z0-9_]+`)
	shown := map[string]bool{}
	for _, file := range []string{"grafana-dashboard.json", "prometheus-rules.yaml"} {
		text, err := os.ReadFile("../../deploy/monitoring/" + file)
		if err != nil {
			t.Fatal(err)
		}
		for _, name := range names.FindAllString(string(text), -1) {
			base := name
			for _, part := range []string{"_bucket", "_sum", "_count"} {
				if f, ok := family(strings.TrimSuffix(name, part)); ok && f.Kind == Histogram {
					base = f.Name
				}
			}
			if _, ok := family(base); !ok {
				t.Errorf("%s asks for %s, which is no metric", file, name)
			}
			shown[base] = shown[base] || file == "grafana-dashboard.json"
		}
	}
	lost := regexp.MustCompile(`_(lost|limited)_total$`)
	for _, f := range Families {
		if lost.MatchString(f.Name) && !shown[f.Name] {
			t.Errorf("no panel of the dashboard shows %s", f.Name)
		}
	}
}
