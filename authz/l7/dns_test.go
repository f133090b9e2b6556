package l7

import (
	"regexp"
	"strings"
	"testing"
)

func TestNameMatches(t *testing.T) {
	for _, c := range []struct {
		rule Name
		yes  string // names, separated by spaces
		no   string
	}{
		{Name{Name: "cilium.io"}, "cilium.io CILIUM.io. cilium.io.", "sub.cilium.io xcilium.io cilium.io.x cilium.i . cilium.io.."},
		{Name{Name: "Cilium.IO."}, "cilium.io", "ciliumxio"},
		{Name{Pattern: "*.cilium.io"}, "sub.cilium.io SUB.Cilium.io. -.cilium.io _x.cilium.io", "cilium.io sub.sub.cilium.io subcilium.io x.cilium.io.evil.com .cilium.io"},
		{Name{Pattern: "part*ial.com"}, "partial.com part-extra-ial.com", "part.ial.com partia.com xpartial.com"},
		{Name{Pattern: "*"}, "cilium.io a.b.c.d . com _ldap._tcp.x", `a\.b.c a\032b.c a..b`},
		{Name{Pattern: "*."}, "cilium.io .", ""},
		{Name{Pattern: "**.cilium.io"}, "app.cilium.io test.app.cilium.io a.b.c.cilium.io", "cilium.io appcilium.io app.cilium.io.x .cilium.io ..cilium.io"},
		{Name{Pattern: "**.*.io"}, "a.b.io c.a.b.io", "b.io io a.b.com"},
		{Name{Pattern: "x.**.io"}, "x.y.io x.yy.io", "x.y.z.io x.io"},
		{Name{Pattern: "**"}, "localhost", "a.b ."},
		{Name{Pattern: "*.*.svc.cluster.local"}, "a.b.svc.cluster.local", "b.svc.cluster.local c.a.b.svc.cluster.local"},
		{Name{Pattern: "a*b*c.d"}, "abc.d axbxc.d abbc.d abcbc.d", "ab.c.d acb.d"},
		{Name{Pattern: "*a"}, "a aa baa", "ab a.b"},
		{Name{Pattern: "A*.COM"}, "apple.com", "pear.com"},
		{Name{}, "", ". a"},
	} {
		for _, name := range strings.Fields(c.yes) {
			if !c.rule.Matches(name) {
				t.Errorf("%+v does not mean %q", c.rule, name)
			}
		}
		for _, name := range strings.Fields(c.no) {
			if c.rule.Matches(name) {
				t.Errorf("%+v means %q", c.rule, name)
			}
		}
	}
	long := strings.Repeat("a.", 127)
	if (Name{Pattern: "*"}).Matches(long + "aaa") {
		t.Error("a name that no message can hold is meant")
	}
	if !(Name{Pattern: "*"}).Matches(strings.TrimSuffix(long, ".")) {
		t.Error("the longest name is not meant")
	}
}

func TestNameValidate(t *testing.T) {
	for _, n := range []Name{{Name: "a.b"}, {Name: "_x.a-b"}, {Pattern: "*"}, {Pattern: "**.x"}, {Pattern: "a*.b*c"}} {
		if err := n.Validate(); err != nil {
			t.Errorf("%+v: %v", n, err)
		}
	}
	for _, n := range []Name{{}, {Name: "a", Pattern: "b"}, {Name: "A"}, {Name: "a."}, {Pattern: "*."}, {Name: "*.a"}, {Name: "a..b"}, {Name: "."}, {Pattern: "."}, {Pattern: "a b"}, {Pattern: "[a-z]"},
		{Name: ".a"}, {Name: strings.Repeat("a", 64)}, {Name: strings.Repeat("a.", 127) + "a"}} {
		if n.Validate() == nil {
			t.Errorf("%+v is taken", n)
		}
	}
}

// FuzzNameMatches holds the matcher against the same said as a regular
// expression.
func FuzzNameMatches(f *testing.F) {
	f.Add("**.a*.b", "x.ab.b")
	f.Add("*", ".")
	f.Add("a*a*a.b", "aaaa.b.")
	f.Add("**.**", "a.b.c")
	f.Fuzz(func(t *testing.T, pattern, name string) {
		n := Name{Pattern: pattern}
		if len(pattern) > 64 || n.Validate() != nil {
			return
		}
		const char = "[-a-zA-Z0-9_]"
		p := strings.ToLower(strings.TrimSuffix(pattern, "."))
		var expr string
		if p == "*" {
			expr = "(" + char + "+[.])*" + char + "*"
		} else {
			if rest, deep := strings.CutPrefix(p, "**."); deep {
				expr, p = "("+char+"+[.])+", rest
			}
			for i := range len(p) {
				switch p[i] {
				case '*':
					expr += char + "*"
				default:
					expr += regexp.QuoteMeta(p[i : i+1])
				}
			}
		}
		normal, ok := NormalName(name)
		want := ok && regexp.MustCompile("^("+expr+")$").MatchString(normal)
		if p != "*" && normal == "" {
			want = false
		}
		if got := n.Matches(name); got != want {
			t.Errorf("pattern %q, name %q: %v, by %s %v", pattern, name, got, expr, want)
		}
	})
}

func TestJudgeName(t *testing.T) {
	r := &Rules{Parser: ParserDNS, Rule: "x", DNS: []Name{{Name: "a.b"}}}
	if _, ok := JudgeName([]*Rules{r}, "a.b."); ok {
		t.Error("rules allow before they are compiled")
	}
	if err := r.Compile(); err != nil {
		t.Fatal(err)
	}
	if rule, ok := JudgeName([]*Rules{{Parser: ParserHTTP}, r}, "A.B."); !ok || rule != "x" {
		t.Errorf("a.b is allowed by %q, %v", rule, ok)
	}
	if _, ok := JudgeName([]*Rules{r}, "b.b."); ok {
		t.Error("b.b is allowed")
	}
}
