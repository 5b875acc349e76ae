package store

import (
	"maps"
	"slices"
	"strings"

	"github.com/oneo-crm/oneo/pkg/fault"
)

// opener opens the store of a location; environ, as os.Environ, has what must not stand in a location.
type opener func(location string, environ []string) (Store, error)

// openers are the kinds of stores by the schemes of their locations. Another kind is one more file of this package under
// a build tag, so that only who wants it has its libraries in the binary: it puts its opener here by an init function,
// and its tests run the suite of all stores.
var openers = map[string]opener{"s3": openS3}

// Open is the store of a location: the path of a directory, s3://bucket/prefix, or what else this binary was built with.
func Open(location string, environ []string) (Store, error) {
	scheme, _, has := strings.Cut(location, "://")
	switch open := openers[scheme]; {
	case location == "":
		return nil, fault.New(fault.Invalid, "no store is configured").WithCode("no_store")
	case !has:
		return NewDir(location)
	case open != nil:
		return open(location, environ)
	}
	return nil, fault.New(fault.Unsupported, "this oneo has no store of the kind %q", scheme).WithCode("unknown_store").
		WithHint("use the path of a directory, or a location that begins with %s://", strings.Join(slices.Sorted(maps.Keys(openers)), ":// or "))
}
