package backup

import (
	"bytes"
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"regexp"
	"strings"
	"time"

	"github.com/oneo-crm/oneo/pkg/fault"
)

const (
	manifestFormat = 1
	// maxManifest bounds what is read of a manifest, in bytes.
	maxManifest    = 64 << 10
	archiveSuffix  = ".oneo"
	manifestSuffix = ".json"
	stamp          = "20060102T150405Z"
)

// Manifest is what is known of a backup without reading its archive.
type Manifest struct {
	Format int `json:"format"`
	// Name is the archive's in the store: <tenant's id>/<when it was begun>-<ID>.oneo. The manifest lies beside it.
	Name         string    `json:"name"`
	ID           string    `json:"id"`
	Run          string    `json:"run,omitempty"` // that made it
	Installation string    `json:"installation"`
	Tenant       string    `json:"tenant"` // its id for the outside
	Slug         string    `json:"slug"`   // as it was then, and so the group
	Group        string    `json:"group"`
	Made         time.Time `json:"made"` // its rows are as they were then
	Version      int       `json:"version"`
	Postgres     int       `json:"postgres"`
	Bytes        int64     `json:"bytes"`  // of the archive
	SHA256       string    `json:"sha256"` // of all of the archive, in hex
	Tables       int       `json:"tables"`
	Rows         int64     `json:"rows"`
	Keys         []string  `json:"keys"` // ids of those that open it; none: it is not encrypted
	Oneo         string    `json:"oneo"`
	// Custom is the sum of the statements that the archive holds for what the tenant has beyond its migrations; empty: there is none, or it was
	// made by an older oneo.
	Custom string `json:"custom_sha256,omitempty"`
	// Kept keeps Prune away from it; Reason says why it was made, or is kept.
	Kept   bool   `json:"kept"`
	Reason string `json:"reason,omitempty"`
}

// manifestName is where the manifest lies.
func (m Manifest) manifestName() string {
	return strings.TrimSuffix(m.Name, archiveSuffix) + manifestSuffix
}

var nameForm = regexp.MustCompile(`^([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})/([0-9]{8}T[0-9]{6}Z)-([0-9a-f]{16})\.oneo$`)

// place is what the name of an archive says.
type place struct {
	tenant, id string
	begun      time.Time
}

func parseName(name string) (p place, ok bool) {
	parts := nameForm.FindStringSubmatch(name)
	if parts == nil {
		return p, false
	}
	begun, err := time.Parse(stamp, parts[2])
	return place{tenant: parts[1], id: parts[3], begun: begun}, err == nil
}

// parseManifestName says of a manifest's name what its archive's says.
func parseManifestName(name string) (p place, ok bool) {
	stem, ok := strings.CutSuffix(name, manifestSuffix)
	if !ok {
		return p, false
	}
	return parseName(stem + archiveSuffix)
}

// signed is a manifest in the store.
type signed struct {
	Manifest json.RawMessage `json:"manifest"`
	// MAC is the HMAC-SHA256 over the bytes of Manifest, in hex.
	MAC string `json:"mac"`
}

func manifestKey(secret string) []byte {
	m := hmac.New(sha256.New, []byte(secret))
	m.Write([]byte("oneo backup manifest"))
	return m.Sum(nil)
}

func (b *Backups) mac(manifest []byte) string {
	m := hmac.New(sha256.New, b.key)
	m.Write(manifest)
	return hex.EncodeToString(m.Sum(nil))
}

// put writes a manifest beside its archive, or replaces it.
func (b *Backups) put(ctx context.Context, m Manifest) error {
	body, err := json.Marshal(m)
	if err != nil {
		return fmt.Errorf("write the manifest: %w", err)
	}
	text, err := json.Marshal(signed{Manifest: body, MAC: b.mac(body)})
	if err != nil {
		return fmt.Errorf("write the manifest: %w", err)
	}
	err = b.o.Store.Put(ctx, m.manifestName(), func(w io.Writer) error {
		_, err := w.Write(append(text, '\n'))
		return err
	})
	if err != nil {
		return b.unwritten(err)
	}
	return nil
}

// read reads the manifest of a name. Unverified: it was not written by this installation, or not for this place.
func (b *Backups) read(ctx context.Context, name string) (m Manifest, err error) {
	in, err := b.o.Store.Get(ctx, name)
	if err != nil {
		return m, err
	}
	defer in.Close()
	text, err := io.ReadAll(io.LimitReader(in, maxManifest+1))
	if err != nil {
		return m, fault.Wrap(err, fault.Unavailable, "the store %s cannot be read", b.o.Store).WithCode("store_unreachable")
	}
	bad := func(format string, args ...any) error {
		return fault.New(fault.Unverified, "the manifest "+name+" "+format, args...).WithCode("manifest_unverified").
			WithHint("if server.secret has been changed since, take the archive itself: oneo restore FILE")
	}
	var s signed
	if len(text) > maxManifest || json.Unmarshal(text, &s) != nil {
		return m, bad("cannot be read")
	}
	// The bytes as they lie there, whatever the JSON package does to them.
	if !hmac.Equal([]byte(b.mac(bytes.TrimSpace(s.Manifest))), []byte(s.MAC)) {
		return m, bad("was not signed with this installation's server.secret, or was changed since")
	}
	if err := json.Unmarshal(s.Manifest, &m); err != nil {
		return m, bad("cannot be read")
	}
	if m.Format > manifestFormat {
		return m, fault.New(fault.Conflict, "the manifest %s has format %d, and this oneo reads up to %d", name, m.Format, manifestFormat).WithCode("manifest_too_new").
			WithHint("use a newer oneo")
	}
	p, ok := parseName(m.Name)
	if !ok || m.manifestName() != name || p.tenant != m.Tenant || p.id != m.ID {
		return m, bad("is that of another backup: %s", m.Name)
	}
	return m, nil
}
