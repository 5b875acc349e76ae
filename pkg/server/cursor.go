package server

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"strconv"
	"strings"

	"github.com/oneo-crm/oneo/pkg/fault"
)

// cursors signs the places at which a list goes on. A cursor is bound to what it was made for - the tenant, the list
// and its parameters - and is refused everywhere else.
type cursors struct{ key []byte }

func newCursors(secret []byte) cursors {
	m := hmac.New(sha256.New, secret)
	m.Write([]byte("oneo cursor v1"))
	return cursors{m.Sum(nil)}
}

func (c cursors) sign(scope []string, payload []byte) []byte {
	m := hmac.New(sha256.New, c.key)
	for _, part := range scope {
		m.Write([]byte(strconv.Itoa(len(part)) + ":" + part))
	}
	m.Write(payload)
	return m.Sum(nil)[:16]
}

// make writes the cursor behind which the next page begins.
func (c cursors) make(scope []string, last any) (string, error) {
	payload, err := json.Marshal(last)
	if err != nil {
		return "", err
	}
	e := base64.RawURLEncoding.Strict()
	return e.EncodeToString(payload) + "." + e.EncodeToString(c.sign(scope, payload)), nil
}

// cursor makes a cursor for a page.
func (s *Server) cursor(scope []string, last any) (*string, error) {
	c, err := s.cursors.make(scope, last)
	return &c, err
}

// read reads a cursor made for the same scope. Invalid, with the code cursor_mismatch: it was not.
func (c cursors) read(scope []string, cursor string, last any) error {
	mismatch := fault.New(fault.Invalid, "this cursor was not made for this list").WithCode("cursor_mismatch").
		WithField(fault.Field{Parameter: "cursor", Code: "cursor_mismatch", Detail: "use the next_cursor of the same list with the same parameters"})
	p, m, ok := strings.Cut(cursor, ".")
	payload, err1 := base64.RawURLEncoding.Strict().DecodeString(p)
	mac, err2 := base64.RawURLEncoding.Strict().DecodeString(m)
	if !ok || err1 != nil || err2 != nil || !hmac.Equal(mac, c.sign(scope, payload)) {
		return mismatch
	}
	if json.Unmarshal(payload, last) != nil {
		return mismatch
	}
	return nil
}
