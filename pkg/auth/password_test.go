package auth_test

import (
	"context"
	"encoding/base64"
	"fmt"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/crypto/argon2"

	"github.com/oneo-crm/oneo/pkg/auth"
	"github.com/oneo-crm/oneo/pkg/fault"
)

const password = "correct horse battery"

func requireFault(t *testing.T, err error, kind fault.Kind, code string) {
	t.Helper()
	require.Truef(t, fault.Is(err, kind), "want a fault of kind %s (%s), got %v", kind, code, err)
	require.Equalf(t, code, fault.Of(err).StableCode(), "%v", err)
}

func TestCheckPassword(t *testing.T) {
	t.Parallel()
	words := []string{"ada.lovelace@example.com", "analytical", ""}
	for _, tc := range []struct{ name, password, code string }{
		{"seven characters", "aB3$xyz", "password_short"},
		{"seven characters of many bytes", "ääääääß", "password_short"},
		{"eight characters", "aB3$xyzw", ""},
		{"eight characters of many bytes", "ääääääßß", ""},
		{"empty", "", "password_short"},
		{"1024 bytes", strings.Repeat("aB3$", 256), ""},
		{"1025 bytes", strings.Repeat("aB3$", 256) + "x", "password_long"},
		{"common", "password", "password_common"},
		{"common in capitals", "QWERTYUIOP", "password_common"},
		{"the last of the list", "greyhoun", "password_common"},
		{"the address", "Ada.Lovelace@example.com", "password_guessable"},
		{"its local part", "ADA.LOVELACE", "password_guessable"},
		{"the tenant", "Analytical", "password_guessable"},
		{"more than a word of the account", "analytical engine", ""},
		{"spaces are characters", "       x", ""},
		{"no text", "abcdefgh\xff", "password_text"},
		{"NUL", "abcdefgh\x00", "password_text"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			err := auth.CheckPassword(tc.password, words...)
			if tc.code == "" {
				require.NoError(t, err)
				return
			}
			requireFault(t, err, fault.Unfit, tc.code)
			require.NotEmpty(t, fault.Of(err).Hint)
			if len(tc.password) > 8 {
				require.NotContains(t, err.Error(), tc.password, "a message that quotes the password ends in a log")
			}
		})
	}
	require.NoError(t, auth.CheckPassword(password), "no words at all")
}

func TestGeneratedPasswords(t *testing.T) {
	t.Parallel()
	seen := map[string]bool{}
	letters := map[rune]bool{}
	for range 200 {
		p := auth.GeneratePassword()
		require.NoError(t, auth.CheckPassword(p))
		require.Regexp(t, `^[a-km-np-z2-9]{6}(-[a-km-np-z2-9]{6}){3}$`, p, "without l, o, 0 and 1")
		require.False(t, seen[p], "the same password twice: %s", p)
		seen[p] = true
		for _, r := range p {
			letters[r] = true
		}
	}
	require.Len(t, letters, 33, "all 32 letters and the dash: 5 bits each, 120 in all")
}

func TestHashAndVerify(t *testing.T) {
	t.Parallel()
	h := auth.NewHasher(2)
	for _, p := range []string{password, "x", strings.Repeat("ä", auth.MaxPasswordBytes/2)} {
		hash, err := h.Hash(t.Context(), p)
		require.NoError(t, err)
		require.Regexp(t, `^\$argon2id\$v=19\$m=19456,t=2,p=1\$[A-Za-z0-9+/]{22}\$[A-Za-z0-9+/]{43}$`, hash)
		again, err := h.Hash(t.Context(), p)
		require.NoError(t, err)
		require.NotEqual(t, hash, again, "each hash has a salt of its own")

		ok, rehash, err := h.Verify(t.Context(), hash, p)
		require.NoError(t, err)
		require.True(t, ok)
		require.False(t, rehash, "a hash made just now is as strong as today's")
		for _, wrong := range []string{"", p + "x", p[:len(p)-1], strings.ToUpper(p), p + "\x00"} {
			ok, rehash, err := h.Verify(t.Context(), hash, wrong)
			require.NoError(t, err)
			require.Falsef(t, ok, "%.40q is not the password", wrong)
			require.False(t, rehash, "a wrong password never asks for a new hash")
		}
	}
}

func TestPasswordsAreNotCut(t *testing.T) {
	t.Parallel()
	h := auth.NewHasher(1)
	long := strings.Repeat("aB3$", 256)
	hash, err := h.Hash(t.Context(), long)
	require.NoError(t, err)
	ok, _, err := h.Verify(t.Context(), hash, long[:len(long)-1]+"x")
	require.NoError(t, err)
	require.False(t, ok, "the last byte counts")
	_, err = h.Hash(t.Context(), long+"x")
	requireFault(t, err, fault.Unfit, "password_length")
	_, err = h.Hash(t.Context(), "")
	requireFault(t, err, fault.Unfit, "password_length")
	empty := phc(19456, 2, 1, []byte("0123456789abcdef"), argon2.IDKey(nil, []byte("0123456789abcdef"), 2, 19456, 1, 32))
	ok, _, err = h.Verify(t.Context(), empty, long+"x")
	require.NoError(t, err)
	require.False(t, ok, "a password beyond the bound is nobody's, whatever it is cut to")
}

func phc(memory, passes uint32, threads uint8, salt, key []byte) string {
	b64 := base64.RawStdEncoding.EncodeToString
	return fmt.Sprintf("$argon2id$v=19$m=%d,t=%d,p=%d$%s$%s", memory, passes, threads, b64(salt), b64(key))
}

func TestRehash(t *testing.T) {
	t.Parallel()
	h := auth.NewHasher(1)
	for _, tc := range []struct {
		name           string
		memory, passes uint32
		threads        uint8
		salt, key      int
		want           bool
	}{
		{"today's", 19456, 2, 1, 16, 32, false},
		{"less memory", 19455, 2, 1, 16, 32, true},
		{"fewer passes", 19456, 1, 1, 16, 32, true},
		{"fewer passes over hardly more memory", 20000, 1, 1, 16, 32, true},
		{"OWASP's other recommendation", 47104, 1, 1, 16, 32, false},
		{"more of both", 32768, 3, 2, 16, 32, false},
		{"short salt", 19456, 2, 1, 8, 32, true},
		{"short key", 19456, 2, 1, 16, 16, true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			salt := []byte("0123456789abcdef")[:tc.salt]
			s := phc(tc.memory, tc.passes, tc.threads, salt, argon2.IDKey([]byte(password), salt, tc.passes, tc.memory, tc.threads, uint32(tc.key)))
			ok, rehash, err := h.Verify(t.Context(), s, password)
			require.NoError(t, err)
			require.True(t, ok, "a hash with other parameters is still the password's")
			require.Equal(t, tc.want, rehash)
		})
	}
}

var (
	salt16 = base64.RawStdEncoding.EncodeToString(make([]byte, 16))
	key32  = base64.RawStdEncoding.EncodeToString(make([]byte, 32))
)

// What somebody who can write to the table could put there.
func hostile() map[string]string {
	ok := "$argon2id$v=19$m=19456,t=2,p=1$" + salt16 + "$" + key32
	params := func(p string) string { return "$argon2id$v=19$" + p + "$" + salt16 + "$" + key32 }
	b64 := func(n int) string { return base64.RawStdEncoding.EncodeToString(make([]byte, n)) }
	return map[string]string{
		"empty":                     "",
		"plain text":                password,
		"bcrypt":                    "$2a$10$N9qo8uLOickgx2ZMRZoMyeIjZAgcfl7p92ldGxad68LJZdL17lhWy",
		"argon2i":                   strings.Replace(ok, "argon2id", "argon2i", 1),
		"argon2d":                   strings.Replace(ok, "argon2id", "argon2d", 1),
		"another version":           strings.Replace(ok, "v=19", "v=16", 1),
		"no version":                strings.Replace(ok, "v=19$", "", 1),
		"something before":          "x" + ok,
		"something behind":          ok + "$",
		"white space behind":        ok + "\n",
		"line break in the salt":    strings.Replace(ok, salt16, salt16[:4]+"\n"+salt16[4:], 1),
		"loose bits":                ok[:len(ok)-1] + "B",
		"padding":                   ok + "=",
		"url alphabet":              strings.Replace(ok, salt16, strings.Repeat("_", 22), 1),
		"4 TiB of memory":           params("m=4294967295,t=2,p=1"),
		"memory past 32 bits":       params("m=4294986752,t=2,p=1"),
		"memory past 64 bits":       params("m=18446744073709571072,t=2,p=1"),
		"memory above the bound":    params("m=262145,t=1,p=1"),
		"no memory":                 params("m=0,t=2,p=1"),
		"negative memory":           params("m=-1,t=2,p=1"),
		"signed memory":             params("m=+19456,t=2,p=1"),
		"leading zero":              params("m=019456,t=2,p=1"),
		"hexadecimal":               params("m=0x4c00,t=2,p=1"),
		"underscores":               params("m=19_456,t=2,p=1"),
		"exponent":                  params("m=1e4,t=2,p=1"),
		"a passes bomb":             params("m=19456,t=4294967295,p=1"),
		"passes above the bound":    params("m=19456,t=17,p=1"),
		"no passes":                 params("m=19456,t=0,p=1"),
		"both at their bounds":      params("m=262144,t=16,p=1"),
		"255 threads":               params("m=19456,t=2,p=255"),
		"256 threads":               params("m=19456,t=2,p=256"),
		"no threads":                params("m=19456,t=2,p=0"),
		"less memory than threads":  params("m=8,t=1,p=8"),
		"another order":             params("t=2,m=19456,p=1"),
		"a parameter twice":         params("m=19456,m=19456,p=1"),
		"a parameter too many":      params("m=19456,t=2,p=1,keyid=x"),
		"a parameter missing":       params("m=19456,t=2"),
		"spaces":                    params("m=19456, t=2, p=1"),
		"no salt":                   strings.Replace(ok, salt16, "", 1),
		"short salt":                strings.Replace(ok, salt16, b64(7), 1),
		"long salt":                 strings.Replace(ok, salt16, b64(65), 1),
		"no key: equal to anything": strings.Replace(ok, key32, "", 1),
		"short key":                 strings.Replace(ok, key32, b64(15), 1),
		"long key":                  strings.Replace(ok, key32, b64(65), 1),
		"a megabyte":                "$argon2id$v=19$m=19456,t=2,p=1$" + strings.Repeat("A", 1<<20) + "$" + key32,
		"a million dollars":         strings.Repeat("$", 1<<20),
	}
}

func TestHostileHashesAreRefusedBeforeTheirWork(t *testing.T) {
	t.Parallel()
	for name, s := range hostile() {
		_, _, _, err := auth.ReadHash(s)
		require.Errorf(t, err, "%s: %.120q", name, s)
		if s != "" {
			require.NotContains(t, err.Error(), s, "an error that quotes the hash ends in a log")
		}
	}
	good := "$argon2id$v=19$m=19456,t=2,p=1$" + salt16 + "$" + key32
	again, memory, passes, err := auth.ReadHash(good)
	require.NoError(t, err)
	require.Equal(t, good, again)
	require.EqualValues(t, 19456, memory)
	require.EqualValues(t, 2, passes)
}

func FuzzHash(f *testing.F) {
	for _, s := range hostile() {
		if len(s) < 1000 {
			f.Add(s)
		}
	}
	f.Add("$argon2id$v=19$m=19456,t=2,p=1$" + salt16 + "$" + key32)
	f.Add("$argon2id$v=19$m=262144,t=1,p=8$" + salt16 + "$" + key32)
	f.Fuzz(func(t *testing.T, s string) {
		again, memory, passes, err := auth.ReadHash(s)
		if err != nil {
			return
		}
		if again != s {
			t.Fatalf("%q is read and written as %q: one hash has two forms", s, again)
		}
		if memory < 8 || memory > 256<<10 || passes < 1 || uint64(memory)*uint64(passes) > 512<<10 {
			t.Fatalf("%q asks for %d KiB and %d passes", s, memory, passes)
		}
	})
}

// An unknown account takes the work of a known one: seen here by the 19 MiB that each computation allocates.
func TestUnknownAccountsCostTheSame(t *testing.T) {
	h := auth.NewHasher(1)
	hash, err := h.Hash(t.Context(), password)
	require.NoError(t, err)
	cost := func(f func()) uint64 {
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		f()
		runtime.ReadMemStats(&after)
		return after.TotalAlloc - before.TotalAlloc
	}
	known := cost(func() { _, _, _ = h.Verify(t.Context(), hash, "wrong horse battery") })
	for name, f := range map[string]func(){
		"unknown account": func() {
			requireFault(t, h.Check(t.Context(), auth.Credential{}, password), fault.Unauthenticated, "login_failed")
		},
		"no hash":             func() { _, _, _ = h.Verify(t.Context(), "", password) },
		"a broken hash":       func() { _, _, _ = h.Verify(t.Context(), "$argon2id$v=19$m=1", password) },
		"an endless password": func() { _, _, _ = h.Verify(t.Context(), hash, strings.Repeat("x", 1<<16)) },
	} {
		got := cost(f)
		require.InDeltaf(t, float64(known), float64(got), float64(known)/10, "%s: %d bytes of work, a known account %d", name, got, known)
	}
	require.Greater(t, known, uint64(19<<20), "the measure measures nothing")
}

func TestAnUnknownAccountHasNoPassword(t *testing.T) {
	t.Parallel()
	h := auth.NewHasher(1)
	// The credential of nobody is all zeros; so is the hash that it is checked against.
	for _, p := range []string{"", password, strings.Repeat("\x00", 32)} {
		requireFault(t, h.Check(t.Context(), auth.Credential{}, p), fault.Unauthenticated, "login_failed")
		stronger, err := h.Strengthen(t.Context(), auth.Credential{}, p)
		require.NoError(t, err)
		require.Empty(t, stronger)
	}
}

func TestHasherBoundsWhatRunsAtOnce(t *testing.T) {
	t.Parallel()
	h := auth.NewHasher(2)
	leave := h.Fill()

	// All slots are taken: who waits gives up with their context and computes nothing.
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	_, err := h.Hash(ctx, password)
	require.ErrorIs(t, err, context.DeadlineExceeded)
	_, _, err = h.Verify(ctx, "", password)
	require.ErrorIs(t, err, context.DeadlineExceeded)
	gone, cancel := context.WithCancel(t.Context())
	cancel()
	require.ErrorIs(t, h.Check(gone, auth.Credential{}, password), context.Canceled)

	// Who still waits goes on as soon as somebody leaves.
	var wg sync.WaitGroup
	errs := make([]error, 5)
	for i := range errs {
		wg.Go(func() { _, errs[i] = h.Hash(t.Context(), password) })
	}
	leave()
	wg.Wait()
	for _, err := range errs {
		require.NoError(t, err)
	}
	h.Fill()() // and every slot was given back: Fill would wait for ever

	_, err = h.Hash(gone, password)
	require.ErrorIs(t, err, context.Canceled, "a slot is free, but nobody waits for the answer")
	h.Fill()()

	none := auth.NewHasher(0)
	_, err = none.Hash(t.Context(), password)
	require.NoError(t, err, "at least one at a time")
}

// weakHash is what a former release may have stored.
func weakHash(password string) string {
	salt := []byte("01234567")
	return phc(8192, 1, 1, salt, argon2.IDKey([]byte(password), salt, 1, 8192, 1, 32))
}
