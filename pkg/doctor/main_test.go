package doctor_test

import (
	"testing"

	"github.com/oneo-crm/oneo/pkg/pgtest"
)

func TestMain(m *testing.M) { pgtest.Main(m) }
