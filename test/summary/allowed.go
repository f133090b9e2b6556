package main

// allowedSkips names the tests that may be skipped although CI=true, each with
// the reason. The key is the package's import path, a space, and the test's
// name. A test that needs root is never listed: CI runs as root.
var allowedSkips = map[string]string{}
