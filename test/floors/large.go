package floors

// Larges are the files and functions that may be larger than the limits.
var Larges = []Large{}
