package schedule

import "time"

// NextLook is when the leader looks next.
func (s *Scheduler) NextLook(t time.Time) time.Time { return looks{s}.Next(t) }
