package crm

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"

	"github.com/oneo-crm/oneo/pkg/fault"
)

// Bounds of numbers. JSONB stores 1e131000 in a few bytes and prints each of its digits whenever it is read.
const (
	maxNumberChars    = 100
	maxExponentDigits = 3
	maxZeros          = 64 << 10 // what the exponents of one value stand for together
)

// exponent is how many digits, at the most, an exponent adds to a number; it is huge when that is out of bounds.
func exponent(n string) (digits int, huge bool) {
	i := strings.IndexAny(n, "eE")
	if i < 0 {
		return 0, false
	}
	text := strings.TrimLeft(n[i+1:], "+-0")
	if len(text) > maxExponentDigits {
		return 0, true
	}
	digits, _ = strconv.Atoi(text) // nothing but zeros: 0
	return digits, false
}

func fitsNumber(n json.Number) bool {
	_, huge := exponent(string(n))
	return len(n) <= maxNumberChars && !huge
}

// Numbers holds the numbers of one JSON value to their bounds. The zero Numbers has seen none.
type Numbers struct{ zeros int }

// Refuse says what is wrong with the value's next number; empty: nothing. Many small exponents are refused like a huge
// one: together they print as much.
func (n *Numbers) Refuse(next json.Number) string {
	if !fitsNumber(next) {
		return fmt.Sprintf("a number has at most %d characters and an exponent below 1000", maxNumberChars)
	}
	digits, _ := exponent(string(next))
	if n.zeros += digits; n.zeros > maxZeros {
		return fmt.Sprintf("the exponents of all numbers together stand for at most %d digits", maxZeros)
	}
	return ""
}

// CheckNumbers refuses JSON with numbers out of their bounds. The server holds every body to the same; this is for JSON
// that reaches PostgreSQL by another way.
func CheckNumbers(raw json.RawMessage) error {
	d := json.NewDecoder(bytes.NewReader(raw))
	d.UseNumber()
	var numbers Numbers
	for {
		t, err := d.Token()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return fault.Wrap(err, fault.Invalid, "it is not JSON").WithCode("malformed_json")
		}
		if n, ok := t.(json.Number); ok {
			if why := numbers.Refuse(n); why != "" {
				return fault.New(fault.Unfit, "a number does not fit: %s", why).WithCode("number")
			}
		}
	}
}
