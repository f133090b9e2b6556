package cni

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
)

// derivedPrefix begins the name of a list that was made of a configuration
// with a single plugin: it sorts before what runtimes look at first.
const derivedPrefix = "00-portcullis-"

// isConfig reports whether runtimes take the file for a network configuration.
func isConfig(name string) bool {
	return slices.Contains([]string{".conf", ".conflist", ".json"}, filepath.Ext(name))
}

// chain returns the list with the plugin as its last, and whether that is a
// change. entry is the plugin's configuration. Everything else in the list
// stays as it is.
func chain(list []byte, entry json.RawMessage) (out []byte, changed bool, err error) {
	top, plugins, err := parseList(list)
	if err != nil {
		return nil, false, err
	}
	if len(plugins) == 0 {
		return nil, false, errors.New("the list has no plugins")
	}
	others := withoutOwn(plugins)
	if len(others) == 0 {
		return nil, false, errors.New("the list has no plugin that makes devices")
	}
	if len(others) == len(plugins)-1 && same(plugins[len(plugins)-1], entry) {
		return list, false, nil
	}
	out, err = printList(top, append(others, entry))
	return out, true, err
}

// unchain returns the list without the plugin, and whether that is a change.
func unchain(list []byte) (out []byte, changed bool, err error) {
	top, plugins, err := parseList(list)
	if err != nil {
		return nil, false, err
	}
	others := withoutOwn(plugins)
	if len(others) == len(plugins) {
		return list, false, nil
	}
	out, err = printList(top, others)
	return out, true, err
}

// listOf makes a list of a configuration with a single plugin.
func listOf(single []byte) ([]byte, error) {
	var plugin map[string]json.RawMessage
	if err := json.Unmarshal(single, &plugin); err != nil {
		return nil, err
	}
	if plugin["type"] == nil {
		return nil, errors.New("it names no plugin (type)")
	}
	top := map[string]json.RawMessage{}
	for _, key := range []string{"cniVersion", "name"} {
		if v, ok := plugin[key]; ok {
			top[key] = v
			delete(plugin, key)
		}
	}
	b, err := json.Marshal(plugin)
	if err != nil {
		return nil, err
	}
	return printList(top, []json.RawMessage{b})
}

func parseList(list []byte) (top map[string]json.RawMessage, plugins []json.RawMessage, err error) {
	if err := json.Unmarshal(list, &top); err != nil {
		return nil, nil, err
	}
	if err := json.Unmarshal(top["plugins"], &plugins); err != nil {
		return nil, nil, fmt.Errorf("plugins: %w", err)
	}
	var version string
	if v, ok := top["cniVersion"]; ok {
		if err := json.Unmarshal(v, &version); err != nil {
			return nil, nil, fmt.Errorf("cniVersion: %w", err)
		}
	}
	// Below 0.3.1 no plugin hears what the one before it made.
	if !slices.Contains(versions.SupportedVersions(), version) {
		return nil, nil, fmt.Errorf("cniVersion %q: plugins can be chained in versions %s only", version, strings.Join(versions.SupportedVersions(), ", "))
	}
	return top, plugins, nil
}

// printList writes a list with its version and name first, as people do.
func printList(top map[string]json.RawMessage, plugins []json.RawMessage) ([]byte, error) {
	var keys []string
	for key := range top {
		if key != "plugins" {
			keys = append(keys, key)
		}
	}
	first := func(key string) int { return slices.Index([]string{"name", "cniVersion"}, key) }
	slices.SortFunc(keys, func(a, b string) int {
		if d := first(b) - first(a); d != 0 {
			return d
		}
		return strings.Compare(a, b)
	})
	var buf bytes.Buffer
	buf.WriteByte('{')
	for _, key := range keys {
		name, err := json.Marshal(key)
		if err != nil {
			return nil, err
		}
		fmt.Fprintf(&buf, "%s:%s,", name, top[key])
	}
	b, err := json.Marshal(plugins)
	if err != nil {
		return nil, err
	}
	fmt.Fprintf(&buf, `"plugins":%s}`, b)
	var out bytes.Buffer
	if err := json.Indent(&out, buf.Bytes(), "", "  "); err != nil {
		return nil, err
	}
	out.WriteByte('\n')
	return out.Bytes(), nil
}

// withoutOwn returns the plugins that are not this one. What cannot be read is
// somebody else's.
func withoutOwn(plugins []json.RawMessage) (out []json.RawMessage) {
	for _, p := range plugins {
		var t struct {
			Type string `json:"type"`
		}
		if json.Unmarshal(p, &t) != nil || t.Type != BinaryName {
			out = append(out, p)
		}
	}
	return out
}

func same(a, b json.RawMessage) bool {
	var x, y any
	if json.Unmarshal(a, &x) != nil || json.Unmarshal(b, &y) != nil {
		return false
	}
	p, err := json.Marshal(x)
	if err != nil {
		return false
	}
	q, err := json.Marshal(y)
	return err == nil && bytes.Equal(p, q)
}
