package main

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/postgres"
)

const (
	hostsBegin = "# oneo: begin (managed by `oneo hosts --apply`)"
	hostsEnd   = "# oneo: end"
)

func newHostsCmd(e *env) *cobra.Command {
	var print, apply bool
	var file, address string
	cmd := &cobra.Command{
		Use: "hosts", Short: "Name this machine's tenants in /etc/hosts",
		Long: `Write the lines of /etc/hosts for every tenant's domain and every public host (server.public_hosts) that is
not under .localhost, which resolves to this machine by itself. --apply replaces oneo's own block in the file and touches nothing else.`,
		Example: "  oneo hosts --print\n  sudo oneo hosts --apply", Args: usageArgs(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if print == apply {
				return errUsage{fault.New(fault.Invalid, "say either --print or --apply")}
			}
			if _, err := netip.ParseAddr(address); err != nil {
				return errUsage{fault.New(fault.Invalid, "--address %q is no IP address", address)}
			}
			a, err := e.open()
			if err != nil {
				return err
			}
			public, err := publicHosts(a.Config)
			if err != nil {
				return err
			}
			var hosts, lines []string
			for _, h := range public {
				if name := h.String(); name != "localhost" && !strings.HasSuffix(name, ".localhost") {
					hosts = append(hosts, name)
					lines = append(lines, address+" "+name)
				}
			}
			err = a.DB.AsOwner(cmd.Context(), postgres.MainGroup, func(tx *postgres.OwnerTx) error {
				const domains = `select d.host from public.domains d join public.tenants t on t.number = d.tenant
where t.state in ('active', 'suspended') and d.host not like '%.localhost' order by d.host`
				rows, err := tx.Query(cmd.Context(), domains)
				if err != nil {
					return err
				}
				defer rows.Close()
				for rows.Next() {
					var host string
					if err := rows.Scan(&host); err != nil {
						return err
					}
					hosts = append(hosts, host)
					lines = append(lines, address+" "+host)
				}
				return rows.Err()
			})
			if err != nil {
				return err
			}
			if apply {
				if err := applyHosts(file, lines); err != nil {
					return err
				}
				e.say("%s names %d domain(s)", file, len(lines))
			}
			if e.output != "table" {
				return show(e, hosts, []column[string]{
					{"HOST", "host", func(h string) any { return h }},
					{"ADDRESS", "address", func(string) any { return address }},
				})
			}
			if print {
				for _, l := range lines {
					fmt.Fprintln(e.out, l)
				}
			}
			return nil
		},
	}
	f := cmd.Flags()
	f.BoolVar(&print, "print", false, "only print the lines")
	f.BoolVar(&apply, "apply", false, "write them into the file")
	f.StringVar(&file, "file", "/etc/hosts", "the `FILE`")
	f.StringVar(&address, "address", "127.0.0.1", "the `IP` that the domains lead to")
	return cmd
}

// applyHosts replaces oneo's block of a hosts file. The file is written beside and renamed; where that is not possible,
// as with a mounted /etc/hosts, it is written in place. On a full disk it is not: that would cut the file short.
func applyHosts(file string, lines []string) error {
	old, err := os.ReadFile(file)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fault.Wrap(err, fault.Forbidden, "%s cannot be read", file)
	}
	var kept []string
	inside := false
	for _, l := range strings.Split(strings.TrimRight(string(old), "\n"), "\n") {
		switch {
		case l == hostsBegin:
			inside = true
		case l == hostsEnd && inside:
			inside = false
		case !inside:
			kept = append(kept, l)
		}
	}
	if inside {
		return fault.New(fault.Conflict, "%s holds the beginning of oneo's block and not its end", file).WithHint("remove the line %q", hostsBegin)
	}
	if len(lines) > 0 {
		kept = append(append(append(kept, hostsBegin), lines...), hostsEnd)
	}
	text := []byte(strings.TrimLeft(strings.Join(kept, "\n"), "\n") + "\n")
	if bytes.Equal(text, old) {
		return nil
	}
	tmp, err := os.CreateTemp(filepath.Dir(file), ".oneo-hosts-")
	inPlace := cannotReplace(err)
	if err == nil {
		_, err = tmp.Write(text)
		err = errors.Join(err, tmp.Chmod(0o644), tmp.Sync(), tmp.Close())
		if err == nil {
			err = os.Rename(tmp.Name(), file)
			inPlace = cannotReplace(err)
		}
		if err != nil {
			_ = os.Remove(tmp.Name()) // it is of no use
		}
	}
	if inPlace {
		err = os.WriteFile(file, text, 0o644)
	}
	if err != nil {
		return fault.Wrap(err, fault.Forbidden, "%s cannot be written", file).WithHint("run it with sudo, or use --print")
	}
	return nil
}

// cannotReplace reports whether a file can be written where it stands and not replaced by another: its folder is closed
// to us, or it is a mount of its own.
func cannotReplace(err error) bool {
	return errors.Is(err, fs.ErrPermission) || errors.Is(err, syscall.EROFS) || errors.Is(err, syscall.EBUSY) || errors.Is(err, syscall.EXDEV)
}
