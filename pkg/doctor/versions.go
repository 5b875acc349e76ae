package doctor

// securityReleased is when the newest release with security fixes came out that this binary knows of.
// Source: https://www.postgresql.org/about/news/postgresql-186-1711-1615-1519-1424-and-19-beta-3-released-3365/ and
// https://www.postgresql.org/support/versioning/. Whoever adds a release moves minor to before.
const securityReleased = "2026-08-13"

// securityMinor is one major version's newest minor with security fixes, and the one before it.
type securityMinor struct {
	major, minor, before int
	ended                bool   // it is mended no more
	released             string // when it ended
}

var securityMinors = []securityMinor{
	{major: 18, minor: 6, before: 4}, // 18.5 was not released
	{major: 17, minor: 11, before: 10},
	{major: 16, minor: 15, before: 14},
	{major: 15, minor: 19, before: 18},
	{major: 14, minor: 24, before: 23, ended: true, released: "2026-11-12"},
}

// redisFixes are the least patches of Redis's branches without a known hole that lets whoever may run scripts run code:
// CVE-2025-49844, of 2025-10-03. Source: https://redis.io/blog/security-advisory-cve-2025-49844/. Branches that the project
// has given up and distributions mend without another number, such as 7.0, cannot be judged by it.
var redisFixes = map[[2]int]int{{6, 2}: 20, {7, 2}: 11, {7, 4}: 6, {8, 0}: 4, {8, 2}: 2}
