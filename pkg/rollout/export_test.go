package rollout

// Waves is the wave of each item.
func Waves(s Spec) []int { return s.waves() }
