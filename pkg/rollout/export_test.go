package rollout

import "context"

// Strained is one look of a brake at a group's database.
func (r *Runner) Strained(ctx context.Context, group string, bounds Bounds) string {
	return (&Brake{told: map[string]bool{}}).look(ctx, r, group, bounds)
}
