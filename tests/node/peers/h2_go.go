// An HBONE client and server made of Go's net/http and crypto/tls.
//
// usage: h2_go client ADDRESS CA CHAIN KEY AUTHORITY STREAMS BYTES   sends BYTES on each of STREAMS to an application that
//
//	echoes them, and prints "same N" with the number of streams on which they came back
//
//	h2_go server ADDRESS CA CHAIN KEY READY_FILE   echoes what comes on each CONNECT stream
package main

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"math/rand"
	"net/http"
	"net/url"
	"os"
	"strconv"
	"sync"
	"sync/atomic"
)

func check(err error) {
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
}

func config(ca, chain, key string) *tls.Config {
	roots := x509.NewCertPool()
	pem, err := os.ReadFile(ca)
	check(err)
	roots.AppendCertsFromPEM(pem)
	own, err := tls.LoadX509KeyPair(chain, key)
	check(err)
	// The certificates have no host names; the chain is not what is tested here.
	return &tls.Config{Certificates: []tls.Certificate{own}, ClientCAs: roots, InsecureSkipVerify: true,
		ClientAuth: tls.RequireAndVerifyClientCert, NextProtos: []string{"h2"}, MinVersion: tls.VersionTLS13}
}

func client(address, authority string, config *tls.Config, streams, size int) {
	transport := &http.Transport{TLSClientConfig: config, ForceAttemptHTTP2: true}
	content := make([]byte, size)
	rand.New(rand.NewSource(7)).Read(content)
	var same atomic.Int32
	var wait sync.WaitGroup
	for range streams {
		wait.Go(func() {
			request := &http.Request{Method: "CONNECT", URL: &url.URL{Scheme: "https", Host: address}, Host: authority,
				Body: io.NopCloser(bytes.NewReader(content)), ContentLength: -1, Header: http.Header{}}
			answer, err := transport.RoundTrip(request)
			check(err)
			if answer.StatusCode != 200 || answer.ProtoMajor != 2 {
				fmt.Println(answer.Status, answer.Proto)
				return
			}
			back, err := io.ReadAll(answer.Body)
			check(err)
			if bytes.Equal(back, content) {
				same.Add(1)
			}
		})
	}
	wait.Wait()
	fmt.Println("same", same.Load())
}

func echo(out http.ResponseWriter, request *http.Request) {
	if request.Method != "CONNECT" {
		out.WriteHeader(405)
		return
	}
	out.WriteHeader(200)
	control := http.NewResponseController(out)
	_ = control.Flush()
	buffer := make([]byte, 65536)
	for {
		length, err := request.Body.Read(buffer)
		if length > 0 {
			if _, err := out.Write(buffer[:length]); err != nil {
				return
			}
			_ = control.Flush()
		}
		if err == io.EOF {
			return
		}
		if err != nil {
			panic(http.ErrAbortHandler)
		}
	}
}

func main() {
	address, config := os.Args[2], config(os.Args[3], os.Args[4], os.Args[5])
	if os.Args[1] == "client" {
		streams, err := strconv.Atoi(os.Args[7])
		check(err)
		size, err := strconv.Atoi(os.Args[8])
		check(err)
		client(address, os.Args[6], config, streams, size)
		return
	}
	listener, err := tls.Listen("tcp", address, config)
	check(err)
	check(os.WriteFile(os.Args[6], nil, 0o644))
	check((&http.Server{Handler: http.HandlerFunc(echo)}).Serve(listener))
}
