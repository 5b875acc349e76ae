package archive

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"

	"filippo.io/age"

	"github.com/oneo-crm/oneo/pkg/fault"
)

// PassphraseKey is the key id of an archive that a passphrase opens.
const PassphraseKey = "passphrase"

// maxWork is the most that opening by a passphrase may cost, as a power of two: 2^20 are about 1 GiB of memory and a few seconds.
const maxWork = 20

// Recipient is somebody that an archive is encrypted to.
type Recipient struct {
	id  string
	age age.Recipient
}

// Identity opens archives.
type Identity struct {
	age age.Identity
}

// ID is the id of the recipient's key, which the archive shows without a key.
func (r Recipient) ID() string { return r.id }

// ParseRecipient reads an age recipient: age1....
func ParseRecipient(s string) (Recipient, error) {
	s = strings.TrimSpace(s)
	r, err := age.ParseX25519Recipient(s)
	if err != nil {
		return Recipient{}, fault.Wrap(err, fault.Invalid, "%q is no age recipient", s).WithCode("bad_recipient").WithHint("a recipient begins with age1; age-keygen makes a pair")
	}
	return Recipient{id: KeyID(r.String()), age: r}, nil
}

// PassphraseRecipient encrypts by a passphrase. It is the only one of its archive.
func PassphraseRecipient(passphrase string) (Recipient, error) {
	r, err := age.NewScryptRecipient(passphrase)
	if err != nil {
		return Recipient{}, fault.Wrap(err, fault.Invalid, "this passphrase cannot be used").WithCode("bad_passphrase")
	}
	return Recipient{id: PassphraseKey, age: r}, nil
}

// ParseIdentities reads the text of an identity file: a secret key in a line, comments and empty lines between.
func ParseIdentities(text string) ([]Identity, error) {
	var all []Identity
	for n, line := range strings.Split(text, "\n") {
		line = strings.TrimSpace(line)
		if line == "" || strings.HasPrefix(line, "#") {
			continue
		}
		id, err := age.ParseX25519Identity(line)
		if err != nil { // the line is a secret: it is not told
			return nil, fault.New(fault.Invalid, "line %d holds no age secret key", n+1).WithCode("bad_identity").WithHint("a secret key begins with AGE-SECRET-KEY-1")
		}
		all = append(all, Identity{id})
	}
	if len(all) == 0 {
		return nil, fault.New(fault.Invalid, "there is no age secret key in it").WithCode("bad_identity")
	}
	return all, nil
}

// PassphraseIdentity opens what PassphraseRecipient encrypted.
func PassphraseIdentity(passphrase string) (Identity, error) {
	id, err := age.NewScryptIdentity(passphrase)
	if err != nil {
		return Identity{}, fault.Wrap(err, fault.Invalid, "this passphrase cannot be used").WithCode("bad_passphrase")
	}
	id.SetMaxWorkFactor(maxWork)
	return Identity{id}, nil
}

// KeyID is what an archive shows of a recipient without a key: the beginning of the checksum of its public text.
func KeyID(recipient string) string {
	sum := sha256.Sum256([]byte(recipient))
	return hex.EncodeToString(sum[:8])
}

// wrongKey is an archive that the given keys do not open.
func wrongKey(cause error, keys []string, given int) error {
	words := "the archive is encrypted, and no key was given"
	if given > 0 {
		words = "the given keys do not open the archive"
	}
	return fault.Wrap(cause, fault.WrongKey, "%s; it was encrypted to %s", words, strings.Join(keys, ", ")).WithCode("wrong_key").
		WithHint("give the key of that id; nothing was changed")
}

// noMatch reports whether age says that no identity opens the file.
func noMatch(err error) bool {
	var none *age.NoIdentityMatchError
	return errors.As(err, &none)
}

func recipients(rs []Recipient) (keys []string, all []age.Recipient, err error) {
	for _, r := range rs {
		if r.age == nil {
			return nil, nil, fmt.Errorf("archive: an empty recipient")
		}
		if r.id == PassphraseKey && len(rs) > 1 {
			return nil, nil, fault.New(fault.Invalid, "a passphrase cannot be combined with other recipients").WithCode("bad_recipient")
		}
		keys, all = append(keys, r.id), append(all, r.age)
	}
	return keys, all, nil
}
