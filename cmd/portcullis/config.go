package main

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/netip"
	"os"
	"slices"
	"strings"

	"github.com/spf13/pflag"
	"go.yaml.in/yaml/v3"

	"portcullis/agent"
)

// defaultConfigFile is read when --config names no other.
const defaultConfigFile = "/etc/portcullis/agent.yaml"

// maxConfigBytes bounds the file: more than this is not a configuration.
const maxConfigBytes = 1 << 20

// settings are a command's flags with the place where each value was set:
// on the command line, in the environment, in the file.
type settings struct {
	flags  *pflag.FlagSet
	names  []string            // of the flags that a file may set
	places map[string][]string // by name; of a list one for each value, or one for all
	inFile map[string]bool     // set by the file
}

// notInFile are flags that tell the command what to do with the file.
var notInFile = []string{"config", "print-config", "cleanup", "purge", "help"}

// newSettings takes the flags of a command, its own ones again in local.
func newSettings(flags, local *pflag.FlagSet) *settings {
	s := &settings{flags: flags, places: map[string][]string{}, inFile: map[string]bool{}}
	flags.VisitAll(func(f *pflag.Flag) { // in the order of their definition
		if local.Lookup(f.Name) == nil {
			return
		}
		if !slices.Contains(notInFile, f.Name) {
			s.names = append(s.names, f.Name)
		}
		if f.Changed {
			s.places[f.Name] = []string{"--" + f.Name}
		}
	})
	return s
}

// load sets what the command line left open from the environment, then from
// the file; a file that must exist is one that was asked for by name. It
// reports everything that is wrong.
func (s *settings) load(getenv func(string) string) error {
	var errs []error
	for _, name := range append([]string{"config"}, s.names...) {
		before := s.flags.Changed(name)
		errs = append(errs, flagsFromEnv(s.flags, getenv, name))
		if s.flags.Changed(name) && !before {
			s.places[name] = []string{envName(name)}
		}
	}
	path := s.flags.Lookup("config")
	if path.Value.String() != "" {
		errs = append(errs, s.fromFile(path.Value.String(), path.Changed))
	}
	return errors.Join(errs...)
}

// place says where the value was set, for messages.
func (s *settings) place(name string, i int) string {
	p := s.places[name]
	if len(p) == 0 {
		return "--" + name
	}
	return p[min(i, len(p)-1)]
}

// override sets a flag by what another flag says.
func (s *settings) override(name, value string, changed bool) {
	_ = s.flags.Lookup(name).Value.Set(value) // a string takes every value
	delete(s.places, name)
	if changed {
		s.places[name] = []string{"--socket"}
	}
}

func (s *settings) fromFile(path string, named bool) error {
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) && !named {
		return nil
	}
	if err != nil {
		return fmt.Errorf("read the configuration: %w", err)
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxConfigBytes+1))
	if err != nil {
		return fmt.Errorf("read the configuration: %w", err)
	}
	if len(data) > maxConfigBytes {
		return fmt.Errorf("%s is longer than %d bytes: it is not a configuration", path, maxConfigBytes)
	}
	return s.fromYAML(path, data)
}

// configReader reads one file and gathers what is wrong with it.
type configReader struct {
	s    *settings
	path string
	errs []error
}

func (r *configReader) bad(n *yaml.Node, field, format string, args ...any) {
	r.errs = append(r.errs, fmt.Errorf("%s:%d: %s: %s", r.path, n.Line, field, fmt.Sprintf(format, args...)))
}

func (s *settings) fromYAML(path string, data []byte) error {
	r := &configReader{s: s, path: path}
	dec := yaml.NewDecoder(strings.NewReader(string(data)))
	var doc yaml.Node
	if err := dec.Decode(&doc); errors.Is(err, io.EOF) {
		return nil // nothing but comments
	} else if err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	if err := dec.Decode(new(yaml.Node)); !errors.Is(err, io.EOF) {
		return fmt.Errorf("%s: want one document: remove what follows the second ---", path)
	}
	root := resolve(doc.Content[0])
	if isNull(root) {
		return nil
	}
	if root.Kind != yaml.MappingNode {
		return fmt.Errorf("%s:%d: want keys and values, e.g. node: n1", path, root.Line)
	}
	r.fields(root, "", s.names, func(name string, key, value *yaml.Node) {
		if !s.flags.Changed(name) { // else the command line or the environment has spoken
			r.set(name, value)
		} else {
			r.values(name, value) // wrong is wrong, also where it is not used
		}
	})
	return errors.Join(r.errs...)
}

// fields calls do for each key of a mapping that is one of names, in order;
// any other key, and a key that stands twice, is an error.
func (r *configReader) fields(m *yaml.Node, prefix string, names []string, do func(name string, key, value *yaml.Node)) {
	seen := map[string]int{}
	for i := 0; i+1 < len(m.Content); i += 2 {
		key, value := m.Content[i], resolve(m.Content[i+1])
		name := key.Value
		switch {
		case key.Kind != yaml.ScalarNode || !slices.Contains(names, name):
			r.bad(key, prefix+name, "unknown key%s", suggest(name, names))
		case seen[name] > 0:
			r.bad(key, prefix+name, "stands here twice, first in line %d", seen[name])
		case isNull(value):
			r.bad(key, prefix+name, "has no value: give one, or remove the key")
		default:
			do(name, key, value)
		}
		if seen[name] == 0 {
			seen[name] = key.Line
		}
	}
}

// set sets a flag from its value in the file.
func (r *configReader) set(name string, value *yaml.Node) {
	texts, nodes, ok := r.values(name, value)
	if !ok {
		return
	}
	for i, text := range texts {
		if err := r.s.flags.Set(name, text); err != nil {
			// pflag wraps the cause in a sentence about the command line.
			if cause := errors.Unwrap(err); cause != nil {
				err = cause
			}
			r.bad(nodes[i], name, "%q: %v", text, err)
			continue
		}
		place := fmt.Sprintf("%s:%d: %s", r.path, nodes[i].Line, name)
		if value.Kind == yaml.SequenceNode {
			place += fmt.Sprintf("[%d]", i)
		}
		r.s.places[name] = append(r.s.places[name], place)
		r.s.inFile[name] = true
	}
}

// values returns what the file says of a flag, as the flag would be given on
// the command line.
func (r *configReader) values(name string, value *yaml.Node) (texts []string, nodes []*yaml.Node, ok bool) {
	flag := r.s.flags.Lookup(name)
	before := len(r.errs)
	_, list := flag.Value.(pflag.SliceValue)
	switch {
	case !list && value.Kind != yaml.ScalarNode:
		r.bad(value, name, "want one value")
	case !list && flag.Value.Type() == "bool" && value.ShortTag() != "!!bool":
		r.bad(value, name, "want true or false")
	case !list:
		return []string{value.Value}, []*yaml.Node{value}, true
	case value.Kind != yaml.SequenceNode:
		r.bad(value, name, "want a list")
	}
	if len(r.errs) > before {
		return nil, nil, false
	}
	for i, item := range value.Content {
		item = resolve(item)
		field := fmt.Sprintf("%s[%d]", name, i)
		var text string
		switch {
		case name == "peer":
			text = r.peer(field, item)
		case item.Kind != yaml.ScalarNode || isNull(item):
			r.bad(item, field, "want one value")
		default:
			text = item.Value
		}
		texts, nodes = append(texts, text), append(nodes, item)
	}
	return texts, nodes, len(r.errs) == before
}

// peer turns {name, address, ranges} into the value of --peer.
func (r *configReader) peer(field string, item *yaml.Node) string {
	if item.Kind != yaml.MappingNode {
		r.bad(item, field, "want {name, address, ranges}")
		return ""
	}
	var name, address string
	var ranges []string
	scalar := func(n *yaml.Node, field string) string {
		if n.Kind != yaml.ScalarNode {
			r.bad(n, field, "want one value")
		}
		return n.Value
	}
	before := len(r.errs)
	r.fields(item, field+".", []string{"name", "address", "ranges"}, func(key string, _, value *yaml.Node) {
		path := field + "." + key
		switch key {
		case "name":
			if name = scalar(value, path); strings.ContainsAny(name, "=,") {
				r.bad(value, path, "%q: want a DNS label", name)
			}
		case "address":
			address = scalar(value, path)
			if _, err := netip.ParseAddrPort(address); err != nil && value.Kind == yaml.ScalarNode {
				r.bad(value, path, "%q: want ADDRESS:PORT", address)
			}
		case "ranges":
			if value.Kind != yaml.SequenceNode {
				r.bad(value, path, "want a list")
			}
			for i, p := range value.Content {
				p, path := resolve(p), fmt.Sprintf("%s[%d]", path, i)
				text := scalar(p, path)
				if _, err := netip.ParsePrefix(text); err != nil && p.Kind == yaml.ScalarNode {
					r.bad(p, path, "%q: not an address prefix", text)
				}
				ranges = append(ranges, text)
			}
		}
	})
	if len(r.errs) == before {
		if name == "" {
			r.bad(item, field+".name", "is missing")
		}
		if address == "" {
			r.bad(item, field+".address", "is missing: want ADDRESS:PORT of its agent")
		}
	}
	return name + "=" + strings.Join(append([]string{address}, ranges...), ",")
}

// origin is where a value comes from, for whoever reads the configuration.
func (s *settings) origin(name string, i int) string {
	if len(s.places[name]) == 0 {
		return "default"
	}
	return s.place(name, i)
}

// write prints the configuration in force as a file that says the same, with
// the place where each value was set.
func (s *settings) write(w io.Writer) error {
	root := &yaml.Node{Kind: yaml.MappingNode}
	for _, name := range s.names {
		f := s.flags.Lookup(name)
		key, value := &yaml.Node{Kind: yaml.ScalarNode, Value: name}, &yaml.Node{}
		if list, ok := f.Value.(pflag.SliceValue); ok {
			value.Kind = yaml.SequenceNode
			for i, text := range list.GetSlice() {
				item := scalarNode(text)
				if name == "peer" {
					item = peerNode(text)
				}
				item.LineComment = s.origin(name, i)
				value.Content = append(value.Content, item)
			}
			if len(value.Content) == 0 {
				value.Style, value.LineComment = yaml.FlowStyle, s.origin(name, 0)
			}
		} else {
			value = scalarNode(f.Value.String())
			if t := f.Value.Type(); t == "bool" || strings.HasPrefix(t, "int") || strings.HasPrefix(t, "uint") {
				value.Tag = "" // a plain word, not a string
			}
			value.LineComment = s.origin(name, 0)
		}
		root.Content = append(root.Content, key, value)
	}
	enc := yaml.NewEncoder(w)
	enc.SetIndent(2)
	return errors.Join(enc.Encode(root), enc.Close())
}

func scalarNode(text string) *yaml.Node {
	return &yaml.Node{Kind: yaml.ScalarNode, Tag: "!!str", Value: text}
}

// peerNode is the inverse of configReader.peer, for a value that was accepted.
func peerNode(text string) *yaml.Node {
	p, err := agent.ParsePeer(text)
	if err != nil {
		return scalarNode(text)
	}
	ranges := &yaml.Node{Kind: yaml.SequenceNode, Style: yaml.FlowStyle}
	for _, r := range p.Ranges {
		ranges.Content = append(ranges.Content, scalarNode(r.String()))
	}
	return &yaml.Node{Kind: yaml.MappingNode, Style: yaml.FlowStyle, Content: []*yaml.Node{
		scalarNode("name"), scalarNode(string(p.Name)), scalarNode("address"), scalarNode(p.Address.String()), scalarNode("ranges"), ranges}}
}

// resolve follows an alias to what it stands for.
func resolve(n *yaml.Node) *yaml.Node {
	if n.Kind == yaml.AliasNode {
		return n.Alias
	}
	return n
}

func isNull(n *yaml.Node) bool { return n.Kind == yaml.ScalarNode && n.ShortTag() == "!!null" }

// suggest names the key that was probably meant: nodeIPs, node_ip and
// node-ips mean node-ip.
func suggest(got string, names []string) string {
	plain := func(s string) string {
		return strings.TrimSuffix(strings.ToLower(strings.NewReplacer("-", "", "_", "").Replace(s)), "s")
	}
	for _, n := range names {
		if plain(n) == plain(got) {
			return fmt.Sprintf(": did you mean %s?", n)
		}
	}
	return ": keys are the names of the flags (`portcullis agent --help`), without the dashes"
}
