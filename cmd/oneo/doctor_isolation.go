package main

import (
	"slices"

	"github.com/spf13/cobra"

	"github.com/oneo-crm/oneo/pkg/doctor"
	"github.com/oneo-crm/oneo/pkg/fault"
)

func newDoctorIsolationCmd(e *env) *cobra.Command {
	var group string
	cmd := &cobra.Command{
		Use: "isolation", Short: "Prove that tenants do not meet each other",
		Long: `Make two throw-away tenants in each database group, do work for both at once over the configured URLs, poolers and
Redis, with one connection between them, and take them away again. Each line is a question: what one tenant's transaction leaves
behind, whether its role may use the other's tables, what the caches and sessions of one say to the other. It says why
nothing leaked, or what did. The last question is asked the wrong way, as a client that sets its path for the session would: that it
leaks shows that a leak would have been seen. Nothing of any other tenant is touched.

The exit code is 13 when something leaks. What was chosen (tenancy.isolation: schema) is a warning.`,
		Example: "  oneo doctor isolation\n  oneo doctor isolation --group eu -o json", Args: usageArgs(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			a, err := e.open()
			if err != nil {
				return err
			}
			groups := a.DB.Groups()
			if group != "" {
				if !slices.Contains(groups, group) {
					return fault.New(fault.NotFound, "there is no database group %q", group).WithCode("unknown_group")
				}
				groups = []string{group}
			}
			if err := a.Migrate.SharedBehind(cmd.Context()); err != nil {
				return err
			}
			proofs, err := a.Isolation(cmd.Context(), groups, e.actor(), e.say)
			if err != nil {
				return err
			}
			if err := show(e, proofs, []column[doctor.Proof]{
				{"CHECK", "check", func(p doctor.Proof) any { return p.Check }},
				{"GROUP", "group", func(p doctor.Proof) any { return p.Group }},
				{"STATE", "state", func(p doctor.Proof) any { return string(p.State) }},
				{"TRIED", "tried", func(p doctor.Proof) any { return p.Tried }},
				{"WHY", "why", func(p doctor.Proof) any { return p.Why }},
			}); err != nil {
				return err
			}
			leaks, odd := 0, 0
			for _, p := range proofs {
				switch p.State {
				case doctor.Fail:
					leaks++
				case doctor.Warn:
					odd++
				}
			}
			if leaks > 0 {
				return fault.New(fault.Pending, "%d question(s) show that tenants meet each other", leaks).WithCode("not_isolated").
					WithHint("oneo doctor names roles and rights that are wrong; `oneo init` and `oneo migrate grants` mend them")
			}
			e.say("nothing leaks; %d to see to", odd)
			return nil
		},
	}
	cmd.Flags().StringVar(&group, "group", "", "only this database `GROUP`")
	return cmd
}
