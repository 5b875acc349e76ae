package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// peaks is the most memory that the migrating process held at each number of tenants.
type peaks []struct {
	tenants         int
	nothing, column float64 // MB
	took            time.Duration
}

// memory measures `oneo migrate --all-tenants` with nothing pending and with one column to add.
func (f *fleet) memory(ctx context.Context, to *peaks) error {
	nothing, err := peakOf(ctx, f.migrate(ctx, f.jobs, "-q"))
	if err != nil {
		return err
	}
	column, err := f.addMigration()
	if err != nil {
		return err
	}
	start := time.Now()
	adding, err := peakOf(ctx, f.migrate(ctx, f.jobs, "-q", "--force"))
	if err != nil {
		return err
	}
	took := time.Since(start)
	if err := f.added(ctx, column); err != nil {
		return err
	}
	*to = append(*to, peaks{{len(f.slugs), nothing, adding, took}}...)
	return nil
}

func (all peaks) print(f *fleet) {
	if len(all) == 0 {
		return
	}
	f.b.printf("### Memory of the migrating process\n")
	f.b.printf("Peak resident memory of `oneo migrate --all-tenants --force` (the linter takes 270 MB more), %d jobs, as the kernel tells it at the end.\n", f.jobs)
	f.b.printf("| tenants | nothing pending MB | of the first | one added column MB | of the first | ms a tenant |\n| --- | --- | --- | --- | --- | --- |")
	most := 0.0
	for _, p := range all {
		a, b := p.nothing/all[0].nothing, p.column/all[0].column
		most = max(most, a, b)
		f.b.printf("| %d | %.1f | **%.2f** | %.1f | **%.2f** | %.2f |", p.tenants, p.nothing, a, p.column, b, ms(p.took)/float64(p.tenants))
	}
	f.b.printf("")
	f.b.goal(most <= 1.2, "flat: at most 1.20 of the first", fmt.Sprintf("at most %.2f", most))
}

// peakOf runs a command and returns the most resident memory that it had, in MB. A child begins its count at what its
// parent held when it was started, and this process holds a lot: the command is the child of a small one.
func peakOf(ctx context.Context, cmd *exec.Cmd) (float64, error) {
	self, err := os.Executable()
	if err != nil {
		return 0, err
	}
	small := exec.CommandContext(ctx, self, append([]string{"-peak"}, cmd.Args...)...)
	small.Env = cmd.Env
	var said strings.Builder
	small.Stderr = &said
	text, err := small.Output()
	if err != nil {
		return 0, fmt.Errorf("%s: %w: %s", strings.Join(cmd.Args, " "), err, tail([]byte(said.String())))
	}
	kb, err := strconv.ParseFloat(strings.TrimSpace(string(text)), 64)
	return kb / 1024, err
}

// tellPeak is a child process of the benchmark: it runs a command, whose output goes to stderr, and tells its peak in kB.
func tellPeak(args []string) error {
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Stdout, cmd.Stderr = os.Stderr, os.Stderr
	if err := cmd.Run(); err != nil {
		return err
	}
	usage, ok := cmd.ProcessState.SysUsage().(*syscall.Rusage)
	if !ok {
		return fmt.Errorf("this system does not tell a process's peak memory")
	}
	fmt.Println(usage.Maxrss)
	return nil
}
