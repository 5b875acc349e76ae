package auth

import (
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"strings"
)

// A token is its prefix and 32 random bytes in 43 characters.
const (
	tokenBytes = 32
	tokenChars = 43
)

// newToken makes a token and the hash under which it is stored.
func newToken(prefix string) (token string, hash []byte) {
	b := make([]byte, tokenBytes)
	_, _ = rand.Read(b) // never fails: it ends the process instead
	token = prefix + base64.RawURLEncoding.EncodeToString(b)
	return token, HashToken(token)
}

// HashToken is what is stored of a token, and what caches know it by.
func HashToken(token string) []byte {
	sum := sha256.Sum256([]byte(token))
	return sum[:]
}

// ParseToken says whether a text has the form of one of the realm's tokens, and of which kind, before any statement
// is run for it.
func (r *Realm) ParseToken(token string) (kind string, ok bool) {
	rest, found := strings.CutPrefix(token, r.session)
	kind = KindSession
	if !found {
		rest, found = strings.CutPrefix(token, r.key)
		kind = KindKey
	}
	if !found || len(rest) != tokenChars {
		return "", false
	}
	var b [tokenBytes]byte
	if n, err := base64.RawURLEncoding.Strict().Decode(b[:], []byte(rest)); err != nil || n != tokenBytes {
		return "", false
	}
	return kind, true
}
