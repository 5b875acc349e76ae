package auth

// ReadHash parses a PHC string and writes it again: the parser without the work that Verify would do.
func ReadHash(s string) (again string, memory, passes uint32, err error) {
	p, err := parseHash(s)
	return p.String(), p.memory, p.time, err
}

// Fill takes every slot of a Hasher until leave is called.
func (h *Hasher) Fill() (leave func()) {
	for range cap(h.slots) {
		h.slots <- struct{}{}
	}
	return func() {
		for range cap(h.slots) {
			<-h.slots
		}
	}
}
