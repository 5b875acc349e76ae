package auth

import (
	"context"
	"crypto/rand"
	"crypto/subtle"
	_ "embed"
	"encoding/base64"
	"fmt"
	"strconv"
	"strings"
	"sync"
	"unicode/utf8"

	"golang.org/x/crypto/argon2"

	"github.com/oneo-crm/oneo/pkg/fault"
)

// Bounds of a password. The upper one keeps a body from becoming work; nothing is cut.
const (
	MinPasswordChars = 8
	MaxPasswordBytes = 1024
)

// The 3,000 most common passwords of at least 8 characters, from the frequency lists of the package zxcvbn
// (Dropbox, MIT licence).
//
//go:embed common_passwords.txt
var commonPasswords string

var common = sync.OnceValue(func() map[string]bool {
	m := map[string]bool{}
	for p := range strings.Lines(commonPasswords) {
		m[strings.TrimSpace(p)] = true
	}
	return m
})

// CheckPassword refuses a password that is too short, too long, among the most common, or one of the words that
// anybody would try for this account (its address, its tenant). The fault is Unfit.
func CheckPassword(password string, words ...string) error {
	bad := func(code, format string, args ...any) error {
		return fault.New(fault.Unfit, format, args...).WithCode(code).
			WithHint("use at least 15 characters, for example several words, or leave the password to oneo")
	}
	if !utf8.ValidString(password) || strings.ContainsRune(password, 0) {
		return bad("password_text", "a password must be text (UTF-8, no NUL)")
	}
	if utf8.RuneCountInString(password) < MinPasswordChars {
		return bad("password_short", "a password needs at least %d characters", MinPasswordChars)
	}
	if len(password) > MaxPasswordBytes {
		return bad("password_long", "a password may have at most %d bytes", MaxPasswordBytes)
	}
	lower := strings.ToLower(password)
	if common()[lower] {
		return bad("password_common", "this password is among the most common ones")
	}
	for _, w := range words {
		name, _, _ := strings.Cut(strings.ToLower(w), "@")
		if w != "" && (lower == strings.ToLower(w) || lower == name) {
			return bad("password_guessable", "the password is the same as the account's name")
		}
	}
	return nil
}

// GeneratePassword makes a password of 24 letters and digits in groups, with 120 bits of chance.
func GeneratePassword() string {
	const letters = "abcdefghijkmnpqrstuvwxyz23456789" // 32, without those that look alike
	b := make([]byte, 24)
	if _, err := rand.Read(b); err != nil {
		panic(err) // never returned since Go 1.24
	}
	var s strings.Builder
	for i, x := range b {
		if i > 0 && i%6 == 0 {
			s.WriteByte('-')
		}
		s.WriteByte(letters[x&31])
	}
	return s.String()
}

// Parameters of new hashes: the first of OWASP's recommendations for Argon2id.
const (
	argonMemoryKiB = 19 * 1024
	argonTime      = 2
	argonThreads   = 1
	saltBytes      = 16
	keyBytes       = 32
)

// Bounds within which a stored hash is computed: one that somebody wrote into the table must not take the machine.
const (
	maxMemoryKiB = 256 * 1024
	maxTime      = 16
	maxThreads   = 8
)

// Hasher computes and checks password hashes, at most so many at a time: each takes 19 MiB.
type Hasher struct {
	slots chan struct{}
	dummy string
}

// NewHasher allows concurrency computations at a time; others wait for as long as their context.
func NewHasher(concurrency int) *Hasher {
	h := &Hasher{slots: make(chan struct{}, max(1, concurrency))}
	h.dummy = encode(argonMemoryKiB, argonTime, argonThreads, make([]byte, saltBytes), make([]byte, keyBytes))
	return h
}

func (h *Hasher) enter(ctx context.Context) (func(), error) {
	select {
	case h.slots <- struct{}{}:
		return func() { <-h.slots }, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// Hash makes the PHC string of a password. Never call it inside a transaction: it takes tens of milliseconds.
func (h *Hasher) Hash(ctx context.Context, password string) (string, error) {
	leave, err := h.enter(ctx)
	if err != nil {
		return "", err
	}
	defer leave()
	salt := make([]byte, saltBytes)
	if _, err := rand.Read(salt); err != nil {
		return "", fmt.Errorf("make a salt: %w", err)
	}
	key := argon2.IDKey([]byte(password), salt, argonTime, argonMemoryKiB, argonThreads, keyBytes)
	return encode(argonMemoryKiB, argonTime, argonThreads, salt, key), nil
}

// Verify checks a password against a PHC string, and says whether the hash should be made anew with stronger
// parameters. A string that is no hash of ours fails after the same work.
func (h *Hasher) Verify(ctx context.Context, phc, password string) (ok, rehash bool, err error) {
	leave, err := h.enter(ctx)
	if err != nil {
		return false, false, err
	}
	defer leave()
	p, perr := parsePHC(phc)
	if perr != nil {
		p, _ = parsePHC(h.dummy)
	}
	if len(password) > MaxPasswordBytes {
		password = ""
	}
	key := argon2.IDKey([]byte(password), p.salt, p.time, p.memory, p.threads, uint32(len(p.key)))
	same := subtle.ConstantTimeCompare(key, p.key) == 1
	if perr != nil {
		return false, false, nil
	}
	weak := p.memory < argonMemoryKiB || p.memory == argonMemoryKiB && p.time < argonTime || len(p.key) < keyBytes
	return same, same && weak, nil
}

func encode(memory, time uint32, threads uint8, salt, key []byte) string {
	b64 := base64.RawStdEncoding.EncodeToString
	return fmt.Sprintf("$argon2id$v=%d$m=%d,t=%d,p=%d$%s$%s", argon2.Version, memory, time, threads, b64(salt), b64(key))
}

type phc struct {
	memory, time uint32
	threads      uint8
	salt, key    []byte
}

func parsePHC(s string) (phc, error) {
	var p phc
	parts := strings.Split(s, "$")
	if len(parts) != 6 || parts[0] != "" || parts[1] != "argon2id" || parts[2] != "v="+strconv.Itoa(argon2.Version) {
		return p, fmt.Errorf("not an argon2id hash")
	}
	number := func(s, name string, bound uint64) (uint64, error) {
		text, ok := strings.CutPrefix(s, name+"=")
		n, err := strconv.ParseUint(text, 10, 32)
		if !ok || err != nil || n < 1 || n > bound {
			return 0, fmt.Errorf("parameter %s is out of bounds", name)
		}
		return n, nil
	}
	params := strings.Split(parts[3], ",")
	if len(params) != 3 {
		return p, fmt.Errorf("wrong parameters")
	}
	m, err := number(params[0], "m", maxMemoryKiB)
	if err != nil {
		return p, err
	}
	t, err := number(params[1], "t", maxTime)
	if err != nil {
		return p, err
	}
	th, err := number(params[2], "p", maxThreads)
	if err != nil {
		return p, err
	}
	p.memory, p.time, p.threads = uint32(m), uint32(t), uint8(th)
	if p.salt, err = base64.RawStdEncoding.Strict().DecodeString(parts[4]); err != nil || len(p.salt) < 8 || len(p.salt) > 64 {
		return p, fmt.Errorf("wrong salt")
	}
	if p.key, err = base64.RawStdEncoding.Strict().DecodeString(parts[5]); err != nil || len(p.key) < 16 || len(p.key) > 64 {
		return p, fmt.Errorf("wrong key")
	}
	return p, nil
}
