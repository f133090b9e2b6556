package l7

import (
	"slices"
	"testing"
)

// What an expression excludes is excluded in every way that a server may read
// it; what it asks for is looked for in what was sent.
func TestExcludedInEveryReading(t *testing.T) {
	judge := func(e Expr, target string, fields ...Field) bool {
		t.Helper()
		rules := &Rules{Rule: "r", Parser: ParserHTTP, HTTP: []HTTP{{Expr: &e}}}
		if err := rules.Compile(); err != nil {
			t.Fatal(err)
		}
		return JudgeHTTP([]*Rules{rules}, &Request{Method: "GET", Target: target, Host: "a", Fields: fields}).Allowed
	}
	but := func(path string) Expr {
		return Expr{All: []Expr{{Path: "/v1/.*"}, {Not: &Expr{Path: path}}}}
	}
	for _, c := range []struct {
		excluded, target string
		want             bool
	}{
		{"/v1/admin", "/v1/admin", false},
		{"/v1/admin", "/v1/public", true},
		{"/v1/admin", "/v1/admins", true},
		{"/v1/admin", "/v1//admin", false},
		{"/v1/admin", "/v1////admin", false},
		{"/v1/admin", "/v1/admin;jsessionid=1", false},
		{"/v1/admin", "/v1/admin;a/;b", true}, // "/v1/admin/" is another path
		{"/v1/admin", "/v1/admin;", false},
		{"/v1/admin", "/v1;x//admin;y", false}, // does not begin with /v1/
		{"/v1/a/admin", "/v1/a;x//admin;y", false},
		{"/v1/admin", "/v1/admin?x=1", false},
		{"/v1/~root", "/v1/%7Eroot", false},
		{"/v1/~root", "/v1/%7eroot;p", false},
		{"/v1/~root", "/v1/%7root", true},
		{"/v1/a b", "/v1/a%20b", false},
		{"/v1/admin", "/v1/?x=/v1/admin", true},
		// The escape of ";" is a character to some, and the begin of a parameter to others.
		{"/v1/admin", "/v1/admin%3Bx", false},
	} {
		if got := judge(but(c.excluded), c.target); got != c.want {
			t.Errorf("all but %s: %s allowed: %v, want %v", c.excluded, c.target, got, c.want)
		}
	}
	// Twice excluded is asked for in every reading.
	twice := Expr{Not: &Expr{Not: &Expr{Path: "/a;x"}}}
	if judge(twice, "/a;x") || !judge(Expr{Path: "/a;x"}, "/a;x") {
		t.Error("a path that only one reading has is what is asked for in all")
	}
	user := Expr{Not: &Expr{Header: &Header{Name: "X-Role", Value: "admin"}}}
	for _, c := range []struct {
		values []string
		want   bool
	}{{nil, true}, {[]string{"user"}, true}, {[]string{"admin"}, false}, {[]string{"user", "admin"}, false}, {[]string{"admin", "user"}, false}, {[]string{"adm", "in"}, true}} {
		var fields []Field
		for _, v := range c.values {
			fields = append(fields, Field{"x-role", v})
		}
		if got := judge(user, "/", fields...); got != c.want {
			t.Errorf("not X-Role admin: %q allowed: %v, want %v", c.values, got, c.want)
		}
	}
	joined := Expr{Not: &Expr{Header: &Header{Name: "X", Value: "a,b"}}}
	if judge(joined, "/", Field{"X", "a"}, Field{"X", "b"}) {
		t.Error("several lines count as one, too")
	}
}

func TestReadings(t *testing.T) {
	var got []string
	for r := range (&Request{Target: "/a//b;x/%7e?q"}).readings() {
		if r.eachLine {
			got = append(got, r.path)
		}
	}
	want := []string{"/a//b;x/%7e", "/a/b;x/%7e", "/a//b/%7e", "/a/b/%7e", "/a//b;x/~", "/a/b;x/~", "/a//b/~", "/a/b/~"}
	if !slices.Equal(got, want) {
		t.Errorf("readings %q, want %q", got, want)
	}
	n := 0
	for range (&Request{Target: "/plain"}).readings() {
		n++
	}
	if n != 2 {
		t.Errorf("%d readings of a plain path, want 2: lines joined, and each", n)
	}
}
