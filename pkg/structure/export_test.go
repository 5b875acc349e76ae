package structure

// Hashes is the query over many schemas.
var Hashes = hash
