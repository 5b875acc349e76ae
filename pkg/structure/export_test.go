package structure

// Hashes is the query over many schemas.
var Hashes = hash

// Lines is the query that describes schemas.
var Lines = lines
