package store

import (
	"strings"

	"github.com/oneo-crm/oneo/pkg/fault"
)

// Open is the store of a location: the path of a directory.
func Open(location string) (Store, error) {
	if location == "" {
		return nil, fault.New(fault.Invalid, "no store is configured").WithCode("no_store")
	}
	if scheme, _, has := strings.Cut(location, "://"); has {
		return nil, fault.New(fault.Unsupported, "there is no store of the kind %q", scheme).WithCode("unknown_store").WithHint("use the path of a directory")
	}
	return NewDir(location)
}
