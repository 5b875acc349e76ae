package auth

import (
	"context"
	"crypto/rand"
	"crypto/subtle"
	_ "embed"
	"encoding/base64"
	"errors"
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

// The 3,000 most common passwords of at least 8 characters, in lower case, from the frequency list of zxcvbn 4.4.2. Its
// licence lies beside the list.
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
	_, _ = rand.Read(b) // never fails: it ends the process instead
	var s strings.Builder
	for i, x := range b {
		if i > 0 && i%6 == 0 {
			s.WriteByte('-')
		}
		s.WriteByte(letters[x&31])
	}
	return s.String()
}

// Parameters of new hashes: OWASP's recommendation for Argon2id with the least memory.
const (
	argonMemoryKiB = 19 * 1024
	argonTime      = 2
	argonThreads   = 1
	saltBytes      = 16
	keyBytes       = 32
)

// argonOnePassKiB is the memory from which OWASP finds one pass enough.
const argonOnePassKiB = 46 * 1024

// Bounds within which a stored hash is computed: one that somebody wrote into the table must not take the machine.
const (
	maxMemoryKiB = 256 * 1024
	maxTime      = 16
	maxThreads   = 8
	maxWorkKiB   = 512 * 1024 // memory times passes: about a second
)

// Hasher computes and checks password hashes, at most so many at a time: each takes 19 MiB.
type Hasher struct {
	slots chan struct{}
	dummy argonHash // of no password; what unknown accounts are checked against
}

// NewHasher allows concurrency computations at a time, but at least one; others wait for as long as their context.
func NewHasher(concurrency int) *Hasher {
	return &Hasher{
		slots: make(chan struct{}, max(1, concurrency)),
		dummy: argonHash{memory: argonMemoryKiB, time: argonTime, threads: argonThreads,
			salt: make([]byte, saltBytes), key: make([]byte, keyBytes)},
	}
}

func (h *Hasher) enter(ctx context.Context) (leave func(), err error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	select {
	case h.slots <- struct{}{}:
		return func() { <-h.slots }, nil
	case <-ctx.Done():
		return nil, fmt.Errorf("wait to compute a password: %w", ctx.Err())
	}
}

// Hash makes the PHC string of a password. Never call it inside a transaction: it takes tens of milliseconds. What
// the password must be like is CheckPassword's affair; only one that Verify would not take is Unfit here.
func (h *Hasher) Hash(ctx context.Context, password string) (string, error) {
	if password == "" || len(password) > MaxPasswordBytes {
		return "", fault.New(fault.Unfit, "a password has 1 to %d bytes", MaxPasswordBytes).WithCode("password_length")
	}
	leave, err := h.enter(ctx)
	if err != nil {
		return "", err
	}
	defer leave()
	p := argonHash{memory: argonMemoryKiB, time: argonTime, threads: argonThreads, salt: make([]byte, saltBytes)}
	_, _ = rand.Read(p.salt) // never fails: it ends the process instead
	p.key = argon2.IDKey([]byte(password), p.salt, p.time, p.memory, p.threads, keyBytes)
	return p.String(), nil
}

// Verify checks a password against a PHC string, and says whether the hash should be made anew with stronger
// parameters. A string that is no hash of ours, and a password that none can have, fail after the same work.
func (h *Hasher) Verify(ctx context.Context, phc, password string) (ok, rehash bool, err error) {
	leave, err := h.enter(ctx)
	if err != nil {
		return false, false, err
	}
	defer leave()
	p, err := parseHash(phc)
	possible := err == nil
	if !possible {
		p = h.dummy
	}
	if len(password) > MaxPasswordBytes {
		password, possible = "", false
	}
	key := argon2.IDKey([]byte(password), p.salt, p.time, p.memory, p.threads, uint32(len(p.key)))
	same := subtle.ConstantTimeCompare(key, p.key) == 1
	return same && possible, same && possible && p.weak(), nil
}

// Check returns nil when the password is the credential's. Call it outside of any transaction. The fault is
// Unauthenticated and the same for a wrong password, an unknown and a disabled account.
func (h *Hasher) Check(ctx context.Context, c Credential, password string) error {
	ok, _, err := h.Verify(ctx, c.hash, password)
	if err != nil {
		return err
	}
	if !ok { // always so for nobody's credential: it has no hash
		return errLogin()
	}
	return nil
}

// Strengthen returns a new hash for a password that Check accepted, when the stored one is weaker than today's, and
// otherwise nothing. Call it outside of any transaction.
func (h *Hasher) Strengthen(ctx context.Context, c Credential, password string) (string, error) {
	p, err := parseHash(c.hash)
	if err != nil || !p.weak() {
		return "", nil
	}
	return h.Hash(ctx, password)
}

// argonHash is what a PHC string says.
type argonHash struct {
	memory, time uint32 // memory in KiB
	threads      uint8
	salt, key    []byte
}

// String is the PHC string.
func (p argonHash) String() string {
	b64 := base64.RawStdEncoding.EncodeToString
	return fmt.Sprintf("$argon2id$v=%d$m=%d,t=%d,p=%d$%s$%s",
		argon2.Version, p.memory, p.time, p.threads, b64(p.salt), b64(p.key))
}

// weak reports whether a hash is less than what new ones are.
func (p argonHash) weak() bool {
	return p.memory < argonMemoryKiB || p.time < argonTime && p.memory < argonOnePassKiB ||
		len(p.salt) < saltBytes || len(p.key) < keyBytes
}

// parseHash reads a PHC string in the one form that String writes, within the bounds. Its errors quote nothing.
func parseHash(s string) (argonHash, error) {
	var p argonHash
	const longest = 256
	parts := strings.Split(s[:min(len(s), longest)], "$")
	if len(s) > longest || len(parts) != 6 || parts[0] != "" || parts[1] != "argon2id" {
		return p, errors.New("not an argon2id hash")
	}
	params := strings.Split(parts[3], ",")
	if len(params) != 3 {
		return p, errors.New("wrong parameters")
	}
	var numbers [3]uint32
	for i, bound := range []struct {
		name string
		most uint64
	}{{"m=", maxMemoryKiB}, {"t=", maxTime}, {"p=", maxThreads}} {
		text, ok := strings.CutPrefix(params[i], bound.name)
		n, err := strconv.ParseUint(text, 10, 32)
		if !ok || err != nil || n < 1 || n > bound.most {
			return p, errors.New("a parameter is missing or out of bounds")
		}
		numbers[i] = uint32(n)
	}
	p.memory, p.time, p.threads = numbers[0], numbers[1], uint8(numbers[2])
	if p.memory*p.time > maxWorkKiB || p.memory < 8*numbers[2] {
		return p, errors.New("the parameters together are out of bounds")
	}
	var err error
	if p.salt, err = base64.RawStdEncoding.DecodeString(parts[4]); err != nil || len(p.salt) < 8 || len(p.salt) > 64 {
		return p, errors.New("wrong salt")
	}
	if p.key, err = base64.RawStdEncoding.DecodeString(parts[5]); err != nil || len(p.key) < 16 || len(p.key) > 64 {
		return p, errors.New("wrong key")
	}
	// Another version, leading zeros, line breaks and loose bits in the base64: one hash has one form.
	if p.String() != s {
		return p, errors.New("not in the form in which hashes are written")
	}
	return p, nil
}

// checkHash keeps what is no password's hash, a password perhaps, out of the tables.
func checkHash(s string) error {
	if _, err := parseHash(s); err != nil {
		return fault.Wrap(err, fault.Internal, "what was to be stored is not a password's hash").WithCode("not_a_hash")
	}
	return nil
}
