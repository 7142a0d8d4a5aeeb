// Resolves each name given by Go's own resolver and prints its addresses in order on one line.
package main

import (
	"context"
	"fmt"
	"net"
	"os"
	"sort"
)

func main() {
	resolver := net.Resolver{PreferGo: true}
	for _, name := range os.Args[1:] {
		fmt.Print(name)
		found, err := resolver.LookupHost(context.Background(), name)
		sort.Strings(found)
		for _, ip := range found {
			fmt.Print(" ", ip)
		}
		if err != nil {
			fmt.Print(" none")
		}
		fmt.Println()
	}
}
