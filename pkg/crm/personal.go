package crm

import (
	"slices"
	"strings"
)

// What a text field may hold of a person, as Options.Personal says it.
const (
	PersonalEmail   = "email"
	PersonalPhone   = "phone"
	PersonalName    = "name"
	PersonalAddress = "address"
	PersonalText    = "text" // anything else
	NotPersonal     = "none"
)

var personal = []string{PersonalEmail, PersonalPhone, PersonalName, PersonalAddress, PersonalText, NotPersonal}

// keyWords say what a field holds by the words of its key, first come first served: email_address is an address of mail.
var keyWords = []struct {
	what  string
	words []string
}{
	{PersonalEmail, []string{"email", "emails", "mail"}},
	{PersonalPhone, []string{"phone", "phones", "telephone", "mobile", "cell", "fax", "tel"}},
	{PersonalAddress, []string{"address", "street", "city", "town", "zip", "postcode", "postal"}},
	{PersonalName, []string{"name", "names", "firstname", "lastname", "surname", "forename", "nickname", "fullname", "username"}},
}

// Personal says what a field holds of a person: what its options say, and otherwise what its key sounds like. NotPersonal:
// nothing, or nobody can tell.
func (f Field) Personal() string {
	if f.Type != Text {
		return NotPersonal
	}
	if f.Options.Personal != "" {
		return f.Options.Personal
	}
	words := strings.Split(f.Key, "_")
	for _, k := range keyWords {
		if slices.ContainsFunc(words, func(w string) bool { return slices.Contains(k.words, w) }) {
			return k.what
		}
	}
	return NotPersonal
}
