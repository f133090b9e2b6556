package datapath

import "errors"

// OpenUntil takes the first steps of Open and ends there as a killed process
// does: nothing is undone, only its files are closed. It returns the names of
// the steps that it took.
func OpenUntil(cfg Config, most int) (taken []string, err error) {
	d, err := prepare(cfg)
	if err != nil {
		return nil, err
	}
	err = d.open(most, func(name string) { taken = append(taken, name) })
	return taken, errors.Join(err, d.Close())
}

// Carried and Afresh name the maps whose entries a migration moves, and those
// that begin empty.
func Carried() (names []string) {
	for name := range carried {
		names = append(names, name)
	}
	return names
}

func Afresh() []string { return afresh }
