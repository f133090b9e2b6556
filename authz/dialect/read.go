package dialect

import (
	"errors"
	"io"
	"regexp"
	"runtime"
	"strconv"
	"strings"

	"go.yaml.in/yaml/v3"
)

// read parses the source. empty tells that there is nothing in it.
func (d *Document) read() (empty bool) {
	d.root = &Value{doc: d, Line: d.Line}
	if directive(d.Source) {
		d.root.Refuse("YAML directives, such as %%YAML and %%TAG, are not supported: remove the line")
		return false
	}
	n := marks(d.Source)
	if n > maxMarks {
		d.root.Refuse("the document is too large: split it")
		return false
	}
	// Else garbage may be as much as what lives, which can be half of what a
	// process is given for this.
	collect := func() {
		if n > manyMarks {
			runtime.GC()
		}
	}
	dec := yaml.NewDecoder(&collecting{strings.NewReader(d.Source), 0, collect})
	var node, more yaml.Node
	err := dec.Decode(&node)
	switch {
	case errors.Is(err, io.EOF):
		return true
	case err != nil:
		d.notYAML(err)
		return false
	}
	if err := dec.Decode(&more); !errors.Is(err, io.EOF) {
		d.root.Refuse("there is something behind the document's end: separate documents by a line that is ---")
		return false
	}
	if node.Kind != yaml.DocumentNode || len(node.Content) != 1 {
		d.root.Refuse("not one YAML document")
		return false
	}
	d.anchors = strings.Contains(d.Source, "&")
	collect()
	d.root = d.convert(node.Content[0], Value{}, 0)
	node = yaml.Node{}
	collect()
	return d.root.tag == "!!null" && len(d.problems) == 0
}

// manyMarks are so many that the reader's garbage counts.
const manyMarks = 20_000

// collecting has garbage collected each time that so many bytes were read.
type collecting struct {
	io.Reader
	read    int
	collect func()
}

func (c *collecting) Read(b []byte) (int, error) {
	n, err := c.Reader.Read(b)
	if c.read += n; c.read >= MaxFile/8 {
		c.read = 0
		c.collect()
	}
	return n, err
}

// marks counts what can begin a node: the reader spends some 200 bytes on
// each, so it is known before.
func marks(source string) int {
	n := strings.Count(source, "\n")
	for _, c := range []string{",", ":", "[", "{", "- ", "? ", "-\t", "?\t"} {
		n += strings.Count(source, c)
	}
	return n
}

// directive reports whether the source begins with a directive. The document
// that it is for begins behind a marker, and would be read without it.
func directive(source string) bool {
	for line := range strings.Lines(source) {
		if text := strings.TrimSpace(line); text != "" && text[0] != '#' {
			return line[0] == '%'
		}
	}
	return false
}

var yamlLine = regexp.MustCompile(`^line (\d+): `)

// notYAML refuses what the YAML reader does, in the line that it names.
func (d *Document) notYAML(err error) {
	msg := strings.TrimPrefix(err.Error(), "yaml: ")
	at := *d.root
	if m := yamlLine.FindStringSubmatch(msg); m != nil {
		if n, err := strconv.Atoi(m[1]); err == nil {
			at.Line, msg = d.Line+n-1, msg[len(m[0]):]
		}
	}
	at.Refuse("not YAML or JSON: %s", msg)
}

// convert makes a tree without aliases. It refuses what people and parsers
// read differently. at says where the value stands in its parent.
func (d *Document) convert(n *yaml.Node, at Value, depth int) *Value {
	v := &at
	v.doc, v.Line, v.tag = d, n.Line+d.Line-1, n.ShortTag()
	if d.values++; d.values > maxValues {
		if d.values == maxValues+1 {
			v.Refuse("the document has more than %d values (aliases count as what they stand for): split it", maxValues)
		}
		return v
	}
	if depth > maxDepth {
		v.Refuse("nested more than %d deep", maxDepth)
		return v
	}
	if n.Style&yaml.TaggedStyle != 0 {
		v.Refuse("tag %s: YAML tags are not supported; remove it", quote(n.Tag))
		return v
	}
	switch n.Kind {
	case yaml.AliasNode:
		// An anchor within itself ends at maxDepth.
		return d.convert(n.Alias, at, depth+1)
	case yaml.MappingNode:
		d.convertMap(v, n, depth)
	case yaml.SequenceNode:
		v.items = make([]*Value, 0, len(n.Content))
		for i, c := range n.Content {
			v.items = append(v.items, d.convert(c, Value{parent: v, index: i}, depth+1))
			d.release(n, i)
			if d.values > maxValues {
				break
			}
		}
	case yaml.ScalarNode:
		v.scalar = n.Value
		if n.Style == 0 && v.tag == "!!str" && yaml11Bool[n.Value] {
			v.tag = "!!bool" // as Kubernetes reads it
		}
	}
	return v
}

// release lets go of nodes that nobody reads again, so that the reader's tree
// shrinks as ours grows.
func (d *Document) release(n *yaml.Node, children ...int) {
	for _, i := range children {
		if !d.anchors {
			n.Content[i] = nil
		}
	}
}

// yaml11Bool are the plain words that Kubernetes' YAML 1.1 reader takes for
// true and false.
var yaml11Bool = map[string]bool{
	"y": true, "Y": true, "yes": true, "Yes": true, "YES": true, "on": true, "On": true, "ON": true,
	"n": true, "N": true, "no": true, "No": true, "NO": true, "off": true, "Off": true, "OFF": true,
}

func (d *Document) convertMap(v *Value, n *yaml.Node, depth int) {
	v.object = true
	if n := len(n.Content) / 2; n > 0 {
		v.items = make([]*Value, 0, n)
	}
	if len(n.Content)/2 > fewFields {
		v.byKey = make(map[string]*Value, len(n.Content)/2)
	}
	for i := 0; i+1 < len(n.Content) && d.values <= maxValues; i += 2 {
		k := n.Content[i]
		line := k.Line + d.Line - 1
		at := Value{parent: v, key: k.Value, doc: d, Line: line}
		switch {
		case k.Kind == yaml.ScalarNode && k.ShortTag() == "!!merge":
			at.Refuse("merge keys are not supported: write the fields out")
			continue
		case k.Kind != yaml.ScalarNode || k.ShortTag() != "!!str" || k.Style == 0 && yaml11Bool[k.Value]:
			at.Refuse("the key is not a string: quote it")
			continue
		case v.field(k.Value) != nil:
			at.Refuse("the field is there twice: remove one")
			continue
		}
		f := d.convert(n.Content[i+1], at, depth+1)
		d.release(n, i, i+1)
		f.Line = line
		v.items = append(v.items, f)
		if v.byKey != nil {
			v.byKey[k.Value] = f
		}
	}
}
