// Package schemas holds the SQL that oneo is delivered with, and nothing else: what every group's database holds, the
// shared tables of the main one, and a tenant's tables. Applied files are never changed; their checksums are in the
// ledger.
package schemas

import "embed"

// Files holds the folders group, shared and tenant, each with files named NNNN_name.up.sql and, where a step can be
// taken back, NNNN_name.down.sql; tenant also has neutralize.sql, which is no migration.
//
//go:embed group/*.sql shared/*.sql tenant/*.sql
var Files embed.FS

// MinTenantVersion is the least version of the tenant files that the code of this binary can serve a tenant at: raise it
// with the code that needs a newer one, and in a later release than the file itself.
const MinTenantVersion = 2
