package structure

import (
	"cmp"
	"slices"
	"strings"
)

// Difference is one thing in which a schema is not like its reference.
type Difference struct {
	// Kind is the kind of object, when it is missing or too much, and otherwise that and the attribute that differs:
	// "index", "column default", "table grants".
	Kind   string `json:"kind"`
	Object string `json:"object"` // users, users.email, f(integer); empty: the schema itself
	Want   string `json:"want"`   // as the reference has it; empty: not at all
	Have   string `json:"have"`   // as the schema has it; empty: not at all

	attribute string // empty: the object itself is missing or too much
	steps     []step
}

// String says the difference in one line. Long values are clipped.
func (d Difference) String() string {
	if d.attribute == "" {
		return oneLine(cmp.Or(when(d.Have == "", "lacks "), "has ") + d.Kind + " " + d.Object)
	}
	value := func(s string) string {
		if s = oneLine(s); s == "yes" {
			return d.attribute
		}
		if r := []rune(s); len(r) > clipped {
			s = string(r[:clipped]) + "..."
		}
		return d.attribute + " " + s
	}
	what := oneLine(strings.TrimSuffix(d.Kind, " "+d.attribute) + " " + d.Object)
	switch {
	case d.Have == "":
		return what + " lacks " + value(d.Want)
	case d.Want == "":
		return what + " has " + value(d.Have)
	}
	return what + " has " + value(d.Have) + ", not " + strings.TrimPrefix(value(d.Want), d.attribute+" ")
}

// oneLine ends up in comments of a script: what somebody called his table must not end one.
func oneLine(s string) string { return strings.Join(strings.Fields(s), " ") }

// clipped is the number of characters of a value that one line shows.
const clipped = 100

// Compare lists how have differs from want, sorted by kind and object. What belongs to a table that is missing or too
// much is not listed by itself. Of a schema that the owner may not even use only that is said.
func Compare(want, have Structure) []Difference {
	c := comparison{want: byName(want), have: byName(have), lost: map[string]bool{}, extra: map[string]bool{}, parts: map[string][]object{}}
	if at := c.have["schema\x1e"]; at.get("closed") != "" {
		// PostgreSQL leaves a schema that the reader may not use out of the search path: nothing in it is described alike.
		c.attributes(c.want["schema\x1e"], at)
		return c.found
	}
	for _, o := range want.objects {
		if _, there := c.have[o.id()]; !there && o.holds() {
			c.lost[o.name] = true
		}
		if parent, part := o.parent(); part {
			c.parts[parent] = append(c.parts[parent], o)
		}
	}
	for _, o := range have.objects {
		if _, there := c.want[o.id()]; !there && o.holds() {
			c.extra[o.name] = true
		}
	}
	for _, o := range want.objects {
		parent, part := o.parent()
		other, there := c.have[o.id()]
		switch {
		case part && (c.lost[parent] || c.extra[parent]):
		case there:
			c.attributes(o, other)
		case o.kind == "column" && o.get("inherited") != "": // its parent's column is missing
		default:
			c.add(Difference{Kind: o.kind, Object: shown(o.name), Want: shown(o.text()), steps: c.create(o)})
		}
	}
	for _, o := range have.objects {
		parent, part := o.parent()
		if _, there := c.want[o.id()]; there || part && (c.lost[parent] || c.extra[parent]) || o.kind == "column" && o.get("inherited") != "" {
			continue
		}
		c.add(Difference{Kind: o.kind, Object: shown(o.name), Have: shown(o.text()), steps: drop(o)})
	}
	slices.SortStableFunc(c.found, func(a, b Difference) int {
		if k := strings.Compare(a.Kind, b.Kind); k != 0 {
			return k
		}
		return strings.Compare(a.Object, b.Object)
	})
	return c.found
}

type comparison struct {
	want, have  map[string]object
	lost, extra map[string]bool     // names of tables and the like
	parts       map[string][]object // of the reference's tables and the like
	found       []Difference
}

func (c *comparison) add(d Difference) { c.found = append(c.found, d) }

// attributes lists the attributes in which an object differs.
func (c *comparison) attributes(want, have object) {
	if want.attributes == have.attributes {
		return
	}
	names := want.names()
	for _, n := range have.names() {
		if !slices.Contains(names, n) {
			names = append(names, n)
		}
	}
	for _, name := range names {
		w, h := want.get(name), have.get(name)
		switch {
		case w == h:
			continue
		case name == "closed", strings.HasPrefix(name, "identity ") && (want.get("identity") == "" || have.get("identity") == ""),
			name == "sequence grants" && (want.get("identity") == "" || have.get("identity") == ""),
			name == "inherited", name == "type" && (want.get("inherited") != "" || have.get("inherited") != ""):
			continue // said by another attribute, or by the table's inheritance
		}
		d := Difference{Kind: want.kind + " " + name, Object: shown(want.name), Want: shown(w), Have: shown(h), attribute: name, steps: c.alter(want, have, name, w, h)}
		if name == "grants" || name == "sequence grants" {
			missing, surplus := apartFrom(w, h)
			d.Want, d.Have = shown(strings.Join(missing, ", ")), shown(strings.Join(surplus, ", "))
		}
		c.add(d)
	}
}

// apartFrom splits two lists into what only the first and only the second holds.
func apartFrom(a, b string) (onlyA, onlyB []string) {
	as, bs := list(a), list(b)
	for _, x := range as {
		if !slices.Contains(bs, x) {
			onlyA = append(onlyA, x)
		}
	}
	for _, x := range bs {
		if !slices.Contains(as, x) {
			onlyB = append(onlyB, x)
		}
	}
	return onlyA, onlyB
}

func list(s string) []string {
	if s == "" {
		return nil
	}
	return strings.Split(s, ",")
}

func byName(s Structure) map[string]object {
	m := make(map[string]object, len(s.objects))
	for _, o := range s.objects {
		m[o.id()] = o
	}
	return m
}

func (o object) id() string { return o.kind + "\x1e" + o.name }

// holds reports whether other objects are parts of this one.
func (o object) holds() bool {
	switch o.kind {
	case "table", "view", "materialized view", "foreign table", "composite type", "domain":
		return true
	}
	return false
}

// parent is the name of the table or the like of which the object is a part.
func (o object) parent() (string, bool) {
	switch o.kind {
	case "column", "constraint", "index", "trigger", "rule", "policy", "domain constraint":
		parent, _, _ := strings.Cut(o.name, apart)
		return parent, true
	}
	return "", false
}

// part is the name behind the parent's.
func (o object) part() string {
	_, name, _ := strings.Cut(o.name, apart)
	return name
}

func (o object) names() []string {
	var names []string
	for a := range strings.SplitSeq(o.attributes, apart) {
		name, _, _ := strings.Cut(a, "=")
		names = append(names, name)
	}
	return names
}

// get is the value of an attribute; empty: the object does not have it.
func (o object) get(name string) string {
	for a := range strings.SplitSeq(o.attributes, apart) {
		if n, v, _ := strings.Cut(a, "="); n == name {
			return v
		}
	}
	return ""
}

// text is the object in one line: its definition where there is one, and what is not as usual.
func (o object) text() string {
	var all []string
	for _, n := range o.names() {
		switch v := o.get(n); n {
		case "owner", "grants", "sequence grants", "storage":
		case "definition", "type":
			all = append(all, v)
		default:
			all = append(all, n+" "+v)
		}
	}
	if len(all) == 0 {
		return o.kind
	}
	return strings.Join(all, "; ")
}

// shown is a name or a value as people read it.
func shown(s string) string {
	return strings.NewReplacer(markSchema, "@schema", markTenant, "@tenant", markOwner, "@owner", markSelf, "@owner", markName, "@schema", apart, ".", comma, ", ").Replace(s)
}
