// Package mask puts made-up values in the place of what is about people. It knows no database.
//
// It promises: the same value of the same kind becomes the same masked value wherever it stands in an installation; two
// different ones never become the same; nobody without the installation's secret can say which value a masked one was; and a
// masked value has the form of its kind: an address of mail is one, a telephone number has the digits and the punctuation that it had.
package mask

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base32"
	"hash"
	"math/big"
	"strings"
	"sync"
)

// Kind is what a value is.
type Kind string

// The kinds. An address of mail ends in @example.invalid, which no mail reaches; a password is replaced by one that opens
// nothing.
const (
	Email    Kind = "email"
	Phone    Kind = "phone"
	Name     Kind = "name"
	Address  Kind = "address"
	Text     Kind = "text"
	Password Kind = "password"
)

// Kinds are all kinds, in the order in which people are told of them.
var Kinds = []Kind{Email, Phone, Name, Address, Text, Password}

// Longest is how many characters a masked value of a kind has at most; 0: as many as the value itself, or as a text.
func Longest(k Kind) int {
	switch k {
	case Email:
		return tokenChars + len(mailDomain)
	case Name:
		return len(namePrefix) + tokenChars
	case Address:
		return len(addressPrefix) + tokenChars
	case Phone:
		return 0
	case Password:
		return len(LockedPassword)
	}
	return len(textPrefix) + tokenChars
}

const (
	mailDomain    = "@example.invalid"
	namePrefix    = "Person "
	addressPrefix = "1 Street "
	textPrefix    = "masked "
	tokenChars    = 24
)

// LockedPassword is what stands for every password: no hash is like it.
const LockedPassword = "!"

// Masker masks by one secret. It is safe for concurrent use.
type Masker struct {
	hashes sync.Pool // hash.Hash by the key; making one costs more than using it
}

// New makes a Masker of the installation's secret, from which its key is derived.
func New(secret string) *Masker {
	h := hmac.New(sha256.New, []byte(secret))
	h.Write([]byte("oneo mask 1"))
	key := h.Sum(nil)
	return &Masker{hashes: sync.Pool{New: func() any { return hmac.New(sha256.New, key) }}}
}

// Value masks one value. What is empty stays empty. A kind that is not among Kinds is masked as a text.
func (m *Masker) Value(k Kind, v string) string {
	if v == "" {
		return ""
	}
	switch k {
	case Email:
		return m.token(k, v) + mailDomain
	case Phone:
		if isPhone(v) {
			return m.phone(v)
		}
		return textPrefix + m.token(k, v) // no digits that could be another's number
	case Name:
		return namePrefix + m.token(k, v)
	case Address:
		return addressPrefix + m.token(k, v)
	case Password:
		return LockedPassword
	}
	return textPrefix + m.token(k, v)
}

var letters = base32.NewEncoding("abcdefghijklmnopqrstuvwxyz234567").WithPadding(base32.NoPadding)

// token stands for a value, by tokenChars letters: 120 bits, of which two are the same by chance never.
func (m *Masker) token(k Kind, v string) string {
	return letters.EncodeToString(m.sum(string(k), v)[:15])
}

// sum is the keyed hash of several parts, of which only the last one may hold a NUL.
func (m *Masker) sum(parts ...string) []byte {
	h := m.hashes.Get().(hash.Hash)
	defer m.hashes.Put(h)
	h.Reset()
	for _, p := range parts {
		h.Write([]byte(p))
		h.Write([]byte{0})
	}
	return h.Sum(nil)
}

const (
	// minDigits and maxDigits bound what is taken for a telephone number. Of fewer digits there are too few to hide one among.
	minDigits = 6
	maxDigits = 40
)

// isPhone reports whether a value is digits with the usual punctuation, and nothing else.
func isPhone(v string) bool {
	n := 0
	for _, r := range v {
		switch {
		case '0' <= r && r <= '9':
			n++
		case !strings.ContainsRune("+-./() ", r):
			return false
		}
	}
	return n >= minDigits && n <= maxDigits
}

// phone exchanges the digits of a number for others and leaves everything between them. It is a keyed permutation of all
// numbers of as many digits, by a Feistel network as in FF1 of NIST SP 800-38G: so two numbers never become the same, as
// a hash of so few digits would have it.
func (m *Masker) phone(v string) string {
	digits := strings.Map(func(r rune) rune {
		if r < '0' || r > '9' {
			return -1
		}
		return r
	}, v)
	const rounds = 10
	half := len(digits) / 2
	a, b := digits[:half], digits[half:]
	for i := range rounds {
		size := len(a)
		modulus := new(big.Int).Exp(big.NewInt(10), big.NewInt(int64(size)), nil)
		n, _ := new(big.Int).SetString(a, 10) // digits only
		n.Add(n, new(big.Int).SetBytes(m.sum("digits", string(rune('0'+i)), string(rune('0'+len(digits))), b)))
		n.Mod(n, modulus)
		text := n.String()
		a, b = b, strings.Repeat("0", size-len(text))+text
	}
	digits = a + b
	i := 0
	return strings.Map(func(r rune) rune {
		if r < '0' || r > '9' {
			return r
		}
		i++
		return rune(digits[i-1])
	}, v)
}
