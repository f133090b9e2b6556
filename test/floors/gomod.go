package floors

import (
	"regexp"
	"slices"
	"strings"
)

var requireLine = regexp.MustCompile(`(?m)^(?:require)?\s*([^\s()]+\.[^\s()]+/?[^\s()]*) v[^\s]+`)

// Direct returns the modules, of those that go.mod requires, from which a
// package of this module imports something, and the modules of its tools.
func Direct(gomod string, pkgs []*Package) (mods []string) {
	var required []string
	for _, m := range requireLine.FindAllStringSubmatch(gomod, -1) {
		required = append(required, m[1])
	}
	// The longest path first: a module may lie below another.
	slices.SortFunc(required, func(a, b string) int { return len(b) - len(a) })
	moduleOf := func(path string) string {
		for _, r := range required {
			if within(path, r) {
				return r
			}
		}
		return ""
	}
	add := func(path string) {
		if m := moduleOf(path); m != "" && !slices.Contains(mods, m) {
			mods = append(mods, m)
		}
	}
	for _, p := range pkgs {
		for _, f := range p.Files {
			for _, path := range f.Imports {
				add(path)
			}
		}
	}
	if _, tools, ok := strings.Cut(gomod, "\ntool ("); ok {
		tools, _, _ = strings.Cut(tools, ")")
		for _, path := range strings.Fields(tools) {
			add(path)
		}
	}
	slices.Sort(mods)
	return mods
}
