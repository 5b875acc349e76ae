package failpoint_test

import (
	"os"
	"os/exec"
	"slices"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/oneo-crm/oneo/pkg/failpoint"
)

const inChild = "FAILPOINT_TEST_CHILD"

// TestMain also serves as the child that hits one place and says what came of it by its exit code.
func TestMain(m *testing.M) {
	if name := os.Getenv(inChild); name != "" {
		os.Exit(child(name))
	}
	os.Exit(m.Run())
}

func child(name string) (code int) {
	defer func() {
		if recover() != nil {
			code = 3
		}
	}()
	if err := failpoint.Hit(name); err != nil {
		return 4
	}
	return 0
}

func TestHit(t *testing.T) {
	t.Parallel()
	name := failpoint.All[0]
	for spec, want := range map[string]int{
		"": 0, name + "=exit": 137, name + "=panic": 3, name + "=error": 4, name + "=wait:" + os.Args[0]: 0, name + "=wait:" + os.Args[0] + "/x": 4, name + "=nonsense": 4,
		name + "=exit@1": 137, name + "=exit@2": 0, name + "=exit@x": 4,
		"no.such.place=exit": 4, name: 4, failpoint.All[1] + "=exit": 0, failpoint.All[1] + "=error," + name + "=exit": 137,
	} {
		t.Run(spec, func(t *testing.T) {
			t.Parallel()
			cmd := exec.Command(os.Args[0])
			cmd.Env = append(os.Environ(), inChild+"="+name, "ONEO_FAILPOINTS="+spec)
			_ = cmd.Run()
			require.Equalf(t, want, cmd.ProcessState.ExitCode(), "ONEO_FAILPOINTS=%q", spec)
		})
	}
}

func TestNamesAreUnique(t *testing.T) {
	t.Parallel()
	names := slices.Clone(failpoint.All)
	slices.Sort(names)
	require.Len(t, slices.Compact(names), len(failpoint.All), "a name stands twice in All")
	require.NoError(t, failpoint.Hit("create.before"), "without ONEO_FAILPOINTS a place does nothing")
}
