// A program that is only looked at.
package main

func main() {}
