package physical

import (
	"encoding/json"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/oneo-crm/oneo/pkg/fault"
)

// said is what pgBackRest 2.45 says of a cluster: a backup of before an upgrade, one of a damaged cluster, one without WAL, a good one.
const said = `[{"archive":[{"database":{"id":1,"repo-key":1},"id":"14-1","max":null,"min":null},{"database":{"id":2,"repo-key":1},"id":"15-2","max":"000000020000000000000008","min":"000000020000000000000002"}],"backup":[
{"archive":{"start":"000000010000000000000002","stop":"000000010000000000000002"},"backrest":{"format":5,"version":"2.45"},"database":{"id":1,"repo-key":1},"error":false,"info":{"delta":1,"repository":{"delta":1,"size":1},"size":1},"label":"20261125-041237F","lsn":{"start":"0/2000028","stop":"0/2000100"},"prior":null,"reference":null,"timestamp":{"start":1795666357,"stop":1795666360},"type":"full"},
{"archive":{"start":"000000020000000000000002","stop":"000000020000000000000002"},"backrest":{"format":5,"version":"2.45"},"database":{"id":2,"repo-key":1},"error":true,"info":{"delta":1,"repository":{"delta":1,"size":1},"size":1},"label":"20261126-041237F","lsn":{"start":"0/2000028","stop":"0/2000100"},"prior":null,"reference":null,"timestamp":{"start":1795666357,"stop":1795666360},"type":"full"},
{"archive":{"start":null,"stop":null},"backrest":{"format":5,"version":"2.45"},"database":{"id":2,"repo-key":1},"error":false,"info":{"delta":1,"repository":{"delta":1,"size":1},"size":1},"label":"20261126-041238F","lsn":{"start":null,"stop":null},"prior":null,"reference":null,"timestamp":{"start":1795666357,"stop":1795666360},"type":"full"},
{"archive":{"start":"000000020000000000000005","stop":"000000020000000000000006"},"backrest":{"format":5,"version":"2.45"},"database":{"id":2,"repo-key":1},"database-ref":[{"name":"postgres","oid":20000},{"name":"x","oid":16384},{"name":"y","oid":16385}],"error":false,"info":{"delta":18629904,"repository":{"delta":2171981,"size":4982872},"size":41564870},"label":"20261126-041237F_20261126-041241D","lsn":{"start":"0/5000028","stop":"0/6000050"},"prior":"20261126-041237F","reference":["20261126-041237F"],"timestamp":{"start":1795666361,"stop":1795666364},"type":"diff"}],
"cipher":"none","db":[{"id":1,"repo-key":1,"system-id":7712328270417240061,"version":"14"},{"id":2,"repo-key":1,"system-id":7712328270417240062,"version":"15"}],"name":"demo","repo":[{"cipher":"none","key":1,"status":{"code":0,"message":"ok"}}],"status":{"code":0,"lock":{"backup":{"held":false}},"message":"ok"}}]`

func TestWhatPgBackRestSays(t *testing.T) {
	t.Parallel()
	var all []stanza
	require.NoError(t, json.Unmarshal([]byte(said), &all))
	info, archive, err := all[0].info()
	require.NoError(t, err)
	require.Equal(t, "15-2", archive)
	require.Equal(t, "7712328270417240062", info.System)
	require.Contains(t, info.Backups[0].Bad, "upgrade")
	require.Equal(t, "7712328270417240061", info.Backups[0].System)
	require.Contains(t, info.Backups[1].Bad, "checksums")
	require.Contains(t, info.Backups[2].Bad, "without WAL")
	require.Equal(t, Backup{
		Label: "20261126-041237F_20261126-041241D", Kind: Differential, Prior: "20261126-041237F", Start: time.Unix(1795666361, 0).UTC(),
		// It ended within the second that it tells: the moment after that one is the first that is safe.
		Stop:     time.Unix(1795666365, 0).UTC(),
		StartLSN: 0x5000028, StopLSN: 0x6000050, Timeline: 2, Bytes: 41564870, Stored: 2171981, System: "7712328270417240062", Major: 15,
	}, info.Backups[3])

	one := all[0]
	one.Backup = one.Backup[3:]
	require.Equal(t, []string{"postgres", "x"}, included(one, []string{"x"}))
	require.Empty(t, included(one, nil))
	require.Empty(t, included(one, []string{"made later"}))
}

func TestWhatPgBackRestComplainsOf(t *testing.T) {
	t.Parallel()
	p, err := NewPgBackRest(PgBackRestOptions{Dir: "/repository"})
	require.NoError(t, err)
	for _, x := range []struct {
		command, said string
		code          int
		want          fault.Fault
	}{
		{"backup", "", 63, fault.Fault{Kind: fault.Unavailable, Code: "physical_program", Message: "pgbackrest backup ended with 63"}},
		{"restore", "ERROR: [039]: raised from local-1 protocol: unable to write '/x': [28] No space left on device\n", 39, fault.Fault{Kind: fault.Unavailable, Code: "disk_full", Message: "pgbackrest restore: unable to write '/x': [28] No space left on device"}},
		{"backup", "WARN: x\n      HINT: none\nERROR: [082]: WAL was not archived\n       HINT: look\n       HINT: there\n", 82, fault.Fault{
			Kind: fault.Unfit, Code: "not_archiving", Message: "pgbackrest backup: WAL was not archived", Hint: "oneo backup physical setup says what is missing. look there",
		}},
		{"expire", "ERROR: [075]: repo1: full backup X cannot be expired\nERROR: [104]: expire command encountered 1 error(s), check the log file for details\n", 104, fault.Fault{
			Kind: fault.Conflict, Code: "backup_needed", Message: "pgbackrest expire: repo1: full backup X cannot be expired",
		}},
		{"info", "ERROR: [029]: key/value found outside of section at line 1: repo1-s3-key-secret = hush\n", 29, fault.Fault{
			Kind: fault.Unavailable, Code: "physical_program", Message: "pgbackrest info: key/value found outside of section at line 1: repo1-s3-key-secret=...",
		}},
	} {
		f := fault.Of(p.failure(x.command, x.code, x.said))
		require.Equal(t, x.want, *f)
	}
	for _, path := range []string{"repository", "/a'b", "/a$b", "/a%b"} {
		_, err := NewPgBackRest(PgBackRestOptions{Dir: path})
		require.Error(t, err)
		_, err = NewPgBackRest(PgBackRestOptions{Dir: "/x", Config: path})
		require.Error(t, err)
	}
}
