package main

import (
	"bytes"
	"context"
	"encoding/json"
	"os"
	"os/exec"

	"github.com/spf13/cobra"

	"github.com/oneo-crm/oneo/pkg/app"
	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/postgres"
	"github.com/oneo-crm/oneo/pkg/registry"
	"github.com/oneo-crm/oneo/pkg/tenant"
)

func newTenantEditCmd(e *env) *cobra.Command {
	var file string
	cmd := &cobra.Command{
		Use: "edit NAME", Short: "Change a tenant's settings in an editor",
		Long: `Open the settings of a tenant, a JSON object whose member "public" anybody may see, in the editor that
$VISUAL or $EDITOR names, and store what it leaves. Nothing is stored when the text is no JSON object, when it is as it was, or
when somebody else has changed the settings meanwhile; the text is kept then, and its file named. --file
stores a file without an editor.`,
		Example: "  oneo tenant edit acme\n  oneo tenant edit acme --file settings.json\n  oneo tenant show acme -o json | jq .settings | oneo tenant edit acme --file -",
		Args:    usageArgs(cobra.ExactArgs(1)), ValidArgsFunction: e.completeFirstTenant,
		RunE: func(cmd *cobra.Command, args []string) error { return tenantEdit(cmd.Context(), e, args[0], file) },
	}
	cmd.Flags().StringVar(&file, "file", "", "store this `FILE` instead of opening an editor; - is standard input")
	return cmd
}

func tenantEdit(ctx context.Context, e *env, name, file string) error {
	if file == "" && !e.terminal {
		return errUsage{fault.New(fault.Invalid, "an editor needs a terminal").WithCode("no_terminal").WithHint("add --file FILE, or --file - for standard input")}
	}
	a, err := e.open()
	if err != nil {
		return err
	}
	t, err := tenantNamed(ctx, a, name)
	if err != nil {
		return err
	}
	var old json.RawMessage
	err = a.DB.AsOwner(ctx, postgres.MainGroup, func(tx *postgres.OwnerTx) error {
		old, err = registry.Settings(ctx, tx, t)
		return err
	})
	if err != nil {
		return err
	}
	var text []byte
	kept := "" // the file of what was edited
	if file != "" {
		if text, err = readFile(e, file); err != nil {
			return fault.Wrap(err, fault.Invalid, "the file with the settings cannot be read")
		}
	} else if text, kept, err = edited(ctx, e, old); err != nil {
		return err
	}
	is, err := inOrder(text)
	if err != nil {
		err = fault.Wrap(err, fault.Unfit, "that is no JSON: %v", err).WithCode("settings")
	} else if was, werr := inOrder(old); werr == nil && bytes.Equal(was, is) {
		e.say("the settings of %s are as they were", t.Slug)
	} else if err = storeSettings(ctx, e, a, t, old, is); err == nil {
		var hosts []tenant.Host
		err = a.DB.AsOwner(ctx, postgres.MainGroup, func(tx *postgres.OwnerTx) error {
			ds, err := registry.Domains(ctx, tx, t)
			for _, d := range ds {
				hosts = append(hosts, d.Host)
			}
			return err
		})
		a.Changed(ctx, t, hosts...)
		e.say("stored the settings of %s", t.Slug)
	}
	if kept != "" {
		if err != nil {
			e.say("your text is in %s", kept)
		} else {
			_ = os.Remove(kept) // it is in the temporary folder
		}
	}
	return err
}

// inOrder is JSON without white space, with its keys in order and its numbers as they are.
func inOrder(text []byte) ([]byte, error) {
	var raw json.RawMessage
	if err := json.Unmarshal(text, &raw); err != nil { // all of it is read, or none
		return nil, err
	}
	dec := json.NewDecoder(bytes.NewReader(raw))
	dec.UseNumber()
	var v any
	if err := dec.Decode(&v); err != nil {
		return nil, err
	}
	return json.Marshal(v)
}

// storeSettings replaces a tenant's settings if they are still the old ones. Caches hold them by the tenant's generation, which is raised.
func storeSettings(ctx context.Context, e *env, a *app.App, t tenant.Tenant, old, settings json.RawMessage) error {
	return a.DB.AsOwner(ctx, postgres.MainGroup, func(tx *postgres.OwnerTx) error {
		if err := registry.SetSettings(ctx, tx, t, old, settings); err != nil {
			if fault.Is(err, fault.Stale) {
				return fault.Wrap(err, fault.Conflict, "somebody else has changed the settings meanwhile").WithCode("settings_changed").WithHint("oneo tenant edit %s", t.Slug)
			}
			return err
		}
		if err := registry.FlushCache(ctx, tx, t); err != nil {
			return err
		}
		return registry.Audit(ctx, tx, registry.AuditEntry{Actor: e.actor(), Action: "settings.change", Tenant: t})
	})
}

// edited lets a person edit settings and returns the text and its file.
func edited(ctx context.Context, e *env, old json.RawMessage) (text []byte, file string, err error) {
	f, err := os.CreateTemp("", "oneo-settings-*.json") // readable by its owner only
	if err != nil {
		return nil, "", err
	}
	var pretty bytes.Buffer
	if err := json.Indent(&pretty, old, "", "  "); err != nil {
		return nil, "", err
	}
	_, err = f.Write(append(pretty.Bytes(), '\n'))
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		return nil, "", err
	}
	editor := e.getenv("VISUAL")
	if editor == "" {
		editor = e.getenv("EDITOR")
	}
	if editor == "" {
		editor = "vi"
	}
	// By a shell, as git does it: the variable may hold options.
	cmd := exec.CommandContext(ctx, "sh", "-c", editor+` "$1"`, "sh", f.Name())
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	if err := cmd.Run(); err != nil {
		_ = os.Remove(f.Name())
		return nil, "", fault.Wrap(err, fault.Invalid, "the editor ended with an error; nothing was stored").WithCode("editor").WithHint("$VISUAL or $EDITOR names it")
	}
	text, err = os.ReadFile(f.Name())
	return text, f.Name(), err
}
