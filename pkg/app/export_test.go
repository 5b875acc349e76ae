package app

import "time"

// MeasureWithin sets what bounds one statement of a measurement.
func (a *App) MeasureWithin(d time.Duration) { a.measureWithin = d }
