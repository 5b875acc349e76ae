package migrate

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path"

	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/postgres"
	"github.com/oneo-crm/oneo/pkg/tenant"
)

// NeutralizeFile lies in a folder of tenant migrations and is none of them. It is run in a clone, at the newest version,
// before anybody sees the clone, and takes off what must not act there as it does in the original: keys, webhooks,
// schedules, mail that goes out.
const NeutralizeFile = "neutralize.sql"

// readNeutralize reads the file of a folder; a folder may have none. The fault is Invalid when it begins or ends a transaction.
func readNeutralize(fsys fs.FS, dir string) (string, error) {
	body, err := fs.ReadFile(fsys, path.Join(dir, NeutralizeFile))
	if errors.Is(err, fs.ErrNotExist) {
		return "", nil
	}
	if err != nil {
		return "", fmt.Errorf("read %s: %w", NeutralizeFile, err)
	}
	text := string(body)
	if len(statementsOf(text)) == 0 {
		return "", badFiles(dir, "%s holds no statement", NeutralizeFile).WithHint("delete it, or write what a clone must not take along")
	}
	return text, parser{dir: dir, file: NeutralizeFile}.sound(text)
}

// Neutralizes reports whether the folder of tenant migrations has a file that neutralises a clone.
func (m *Migrator) Neutralizes() bool { return m.neutralize != "" }

// Neutralize runs the folder's file in a schema that is at the newest version, and leaves the transaction bound to it.
// Without a file it does nothing. Unfit (neutralize_failed): one of its
// statements failed.
func (m *Migrator) Neutralize(ctx context.Context, tx *postgres.OwnerTx, schema tenant.Schema) error {
	if m.neutralize == "" {
		return nil
	}
	if err := tx.Bind(ctx, schema); err != nil {
		return err
	}
	if lasts(m.neutralize) {
		tx.Retire()
	}
	done, err := tx.Run(ctx, m.neutralize)
	code := postgres.SQLState(err)
	if err == nil || code == "" || mayPass(code) {
		return err
	}
	where := ""
	if steps := statementsOf(m.neutralize); done < len(steps) {
		where = fmt.Sprintf(" in line %d", steps[done].line)
	}
	return fault.Wrap(err, fault.Unfit, "%s failed%s (SQLSTATE %s)", NeutralizeFile, where, code).WithCode("neutralize_failed").WithHint("%s", failureHint(code))
}
