// The benchmarks are a module of their own, so that what they measure oneo against never enters its go.mod.
module github.com/oneo-crm/oneo/bench

go 1.26.0

require github.com/oneo-crm/oneo v0.0.0

replace github.com/oneo-crm/oneo => ../
