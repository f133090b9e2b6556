package l7

import (
	"encoding/json"
	"slices"
	"strings"
	"testing"
)

func rules(t *testing.T, src string) []*Rules {
	t.Helper()
	r := &Rules{}
	if err := json.Unmarshal([]byte(src), r); err != nil {
		t.Fatal(err)
	}
	if err := r.Compile(); err != nil {
		t.Fatal(err)
	}
	return []*Rules{r}
}

// request reads "METHOD TARGET HOST|Name: value|...".
func request(s string) *Request {
	parts := strings.Split(s, "|")
	first := strings.Fields(parts[0])
	r := &Request{Method: first[0], Target: first[1], Host: first[2]}
	for _, p := range parts[1:] {
		name, value, _ := strings.Cut(p, ": ")
		r.Fields = append(r.Fields, Field{name, value})
	}
	return r
}

func TestJudgeHTTP(t *testing.T) {
	const force = `{"any":[{"all":[{"method":"GET"},{"path":"/v1/"}]},
		{"all":[{"method":"PUT"},{"header":{"name":"X-Has-Force","value":"true"}},{"path":"/v1/exhaust-port"}]}]}`
	for _, c := range []struct {
		rules, request string
		want           bool
	}{
		{`[]`, "GET / a", false},
		{`[{}]`, "GET / a", true},
		{`[{"method":"POST","path":"/v1/request-landing"}]`, "POST /v1/request-landing a", true},
		{`[{"method":"POST","path":"/v1/request-landing"}]`, "PUT /v1/request-landing a", false},
		{`[{"method":"POST","path":"/v1/request-landing"}]`, "POST /v1/request-landing/ a", false},
		{`[{"method":"POST","path":"/v1/request-landing"}]`, "POST /v1/request-landing?x a", false},
		{`[{"method":"POST"}]`, "POSTS / a", false},
		{`[{"method":"post"}]`, "POST / a", false},
		{`[{"path":"/public/.*"}]`, "GET /public/a?b=c a", true},
		{`[{"path":"/public/.*"}]`, "GET /x/public/a a", false},
		{`[{"path":"/a|/b"}]`, "GET /bc a", false},
		{`[{"path":"/a|/b"}]`, "GET /b a", true},
		{`[{"path":"(?i)/a$"}]`, "GET /A a", true},
		{`[{"host":"a\\.example"}]`, "GET / a.example", true},
		{`[{"host":"a\\.example"}]`, "GET / A.Example", true},
		{`[{"host":"a\\.example"}]`, "GET / a.example:8080", false},
		{`[{"host":"a\\.example"}]`, "GET / xa.example", false},
		{`[{"headers":[{"name":"X-A"}]}]`, "GET / a|x-a: 1", true},
		{`[{"headers":[{"name":"X-A"}]}]`, "GET / a|X-B: 1", false},
		{`[{"headers":[{"name":"X-A","value":"1"}]}]`, "GET / a|x-A: 1", true},
		{`[{"headers":[{"name":"X-A","value":"1"}]}]`, "GET / a|X-A: 1|X-A: 2", false},
		{`[{"headers":[{"name":"X-A","value":"1,2"}]}]`, "GET / a|X-A: 1|X-A: 2", true},
		{`[{"headers":[{"name":"X-A","pattern":"[0-9]+"}]}]`, "GET / a|X-A: 12", true},
		{`[{"headers":[{"name":"X-A","pattern":"[0-9]+"}]}]`, "GET / a|X-A: 12b", false},
		{`[{"headers":[{"name":"X-A","value":"1"},{"name":"X-B"}]}]`, "GET / a|X-A: 1", false},
		{`[{"expr":` + force + `}]`, "GET /v1/ a", true},
		{`[{"expr":` + force + `}]`, "GET /v1/?all a", true},
		{`[{"expr":` + force + `}]`, "PUT /v1/exhaust-port a", false},
		{`[{"expr":` + force + `}]`, "PUT /v1/exhaust-port a|x-has-force: true", true},
		{`[{"expr":` + force + `}]`, "PUT /v1/exhaust-port a|x-has-force: false", false},
		{`[{"expr":{"not":{"host":"(?:admin)(?::[0-9]*)?"}}}]`, "GET / ADMIN:80", false},
		{`[{"expr":{"not":{"host":"(?:admin)(?::[0-9]*)?"}}}]`, "GET / b", true},
	} {
		got := JudgeHTTP(rules(t, `{"parser":"http","rule":"r","http":`+c.rules+`}`), request(c.request))
		if got.Allowed != c.want || got.Allowed != (got.Rule == "r") {
			t.Errorf("%s with %s: %+v, want %v", c.request, c.rules, got, c.want)
		}
	}
}

func TestMismatchActions(t *testing.T) {
	for _, c := range []struct {
		header, request string
		changes         []Change
		mismatched      bool
	}{
		{`"value":"1"`, "GET / a|X-A: 1", nil, false},
		{`"value":"1","mismatch":"LOG"`, "GET / a|X-A: 2", nil, true},
		{`"value":"1","mismatch":"LOG"`, "GET / a|X-A: 1", nil, false},
		{`"value":"1","mismatch":"ADD"`, "GET / a", []Change{{"X-A", "1", false, true}}, true},
		{`"value":"1","mismatch":"ADD"`, "GET / a|X-A: 2", []Change{{"X-A", "1", false, true}}, true},
		{`"value":"1","mismatch":"DELETE"`, "GET / a|X-A: 2", []Change{{"X-A", "", true, false}}, true},
		{`"value":"1","mismatch":"REPLACE"`, "GET / a|X-A: 2", []Change{{"X-A", "1", true, true}}, true},
	} {
		v := JudgeHTTP(rules(t, `{"parser":"http","rule":"r","http":[{"headers":[{"name":"X-A",`+c.header+`}]}]}`), request(c.request))
		if !v.Allowed || !slices.Equal(v.Changes, c.changes) || (len(v.Mismatched) > 0) != c.mismatched {
			t.Errorf("%s with %s: %+v", c.request, c.header, v)
		}
	}
	two := rules(t, `{"parser":"http","http":[{"headers":[{"name":"A","value":"1","mismatch":"ADD"}]},{"method":"GET"}]}`)
	if v := JudgeHTTP(two, request("GET / a")); !v.Allowed || v.Changes != nil {
		t.Errorf("a rule with actions went before one without: %+v", v)
	}
}

func TestCompileRefuses(t *testing.T) {
	deep := strings.Repeat(`{"not":`, 200) + `{"method":"GET"}` + strings.Repeat(`}`, 200)
	for _, src := range []string{
		`{"http":[{}]}`,
		`{"parser":"http","dns":[{"matchName":"a"}]}`,
		`{"parser":"http","http":[{"path":"("}]}`,
		`{"parser":"http","http":[{"path":")|(.*"}]}`,
		`{"parser":"http","http":[{"headers":[{"name":"a b"}]}]}`,
		`{"parser":"http","http":[{"headers":[{"name":"a","value":"x\r\ny"}]}]}`,
		`{"parser":"http","http":[{"headers":[{"name":"a","mismatch":"ALLOW"}]}]}`,
		`{"parser":"http","http":[{"headers":[{"name":"Content-Length","mismatch":"DELETE"}]}]}`,
		`{"parser":"http","http":[{"headers":[{"name":"Transfer-Encoding","value":"chunked","mismatch":"ADD"}]}]}`,
		`{"parser":"http","http":[{"expr":{}}]}`,
		`{"parser":"http","http":[{"expr":{"method":"GET","path":"/"}}]}`,
		`{"parser":"http","http":[{"expr":` + deep + `}]}`,
		`{"parser":"dns","dns":[{"matchName":"a","matchPattern":"b"}]}`,
		`{"parser":"dns","dns":[{"matchName":"A"}]}`,
		`{"parser":"tls","serverNames":[""]}`,
		`{"parser":"http","http":[{"path":"` + strings.Repeat("a", maxPatterns+1) + `"}]}`,
	} {
		r := &Rules{}
		if err := json.Unmarshal([]byte(src), r); err != nil {
			t.Fatal(err)
		}
		if err := r.Compile(); err == nil {
			t.Errorf("%.100s: compiles", src)
		}
		// What did not compile allows nothing, whatever part of it did.
		if v := JudgeHTTP([]*Rules{r}, request("GET / a")); v.Allowed {
			t.Errorf("%.100s: allows", src)
		}
	}
	if err := json.Unmarshal([]byte(`{"parser":"kafka"}`), &Rules{}); err == nil {
		t.Error("an unknown parser was read")
	}
}

func TestServerNames(t *testing.T) {
	rs := rules(t, `{"parser":"tls","rule":"r","serverNames":["a.example","*.b.example","**.c.example"]}`)
	for name, want := range map[string]bool{
		"a.example": true, "x.a.example": false, "b.example": false, "x.b.example": true, "y.x.b.example": false,
		"c.example": false, "x.c.example": true, "y.x.c.example": true, "": false,
	} {
		if _, got := JudgeServerName(rs, name); got != want {
			t.Errorf("%q: %v", name, got)
		}
	}
	if _, ok := JudgeServerName(rules(t, `{"parser":"tls","serverNames":["*"]}`), ""); ok {
		t.Error("no name was allowed by *")
	}
}

func TestPatternHelpers(t *testing.T) {
	for _, c := range []struct {
		pattern, s string
		want       bool
	}{
		{Exact("a.b"), "a.b", true},
		{Exact("a.b"), "axb", false},
		{Contains("^/foo"), "/foo/bar", true},
		{Contains("^/foo"), "/x/foo", false},
		{Contains("foo|bar"), "xbary", true},
		{AnyPort("a|b"), "a:80", true},
		{AnyPort("a|b"), "b", true},
		{AnyPort("a|b"), "ab", false},
	} {
		m, err := (&compiler{left: maxPatterns}).pattern(c.pattern, "")
		if err != nil || m.matches(c.s) != c.want {
			t.Errorf("%s on %s: want %v (%v)", c.pattern, c.s, c.want, err)
		}
	}
}
