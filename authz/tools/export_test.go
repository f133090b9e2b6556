package tools

// ReadInPartsOf makes the reader split files into parts of so many bytes.
func (r *Reader) ReadInPartsOf(size int) { r.partSize = size }
