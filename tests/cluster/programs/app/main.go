// The test application: servers, and clients that say as JSON what became of their connections.
//
//	app serve ADDRESS                HTTP: answers with its host name, the client's address and the canary
//	app echo ADDRESS                 TCP: gives back what it gets
//	app get URL                      one request; prints the answer
//	app load URL RATE SECONDS        RATE requests a second, each on a connection of its own
//	app hold ADDRESS COUNT SECONDS   COUNT connections to an echo server with a message a second on each
//	app sleep                        until it is told to end
//	app true                         ends at once
//
// All that servers and clients send holds the canary, CANARY-IN-CLEAR, by which plaintext is found on a wire.
package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/signal"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

const canary = "CANARY-IN-CLEAR"

func main() {
	arguments := append(os.Args[1:], "", "", "", "")
	ended, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	var err error
	switch arguments[0] {
	case "serve":
		err = serve(ended, arguments[1])
	case "echo":
		err = echo(arguments[1])
	case "get":
		err = get(arguments[1])
	case "load":
		err = load(ended, arguments[1], number(arguments[2]), number(arguments[3]))
	case "hold":
		err = hold(ended, arguments[1], number(arguments[2]), number(arguments[3]))
	case "sleep":
		<-ended.Done()
	case "true":
	default:
		err = fmt.Errorf("no command is called %q", arguments[0])
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func number(text string) int {
	value, err := strconv.Atoi(text)
	if err != nil || value < 1 {
		fmt.Fprintf(os.Stderr, "%q is no number above 0\n", text)
		os.Exit(2)
	}
	return value
}

func serve(ended context.Context, address string) error {
	host, err := os.Hostname()
	if err != nil {
		return err
	}
	mux := http.NewServeMux()
	mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprintf(w, "%s %s %s\n", host, r.RemoteAddr, canary)
	})
	mux.HandleFunc("/ready", func(w http.ResponseWriter, r *http.Request) {
		if ended.Err() != nil {
			w.WriteHeader(http.StatusServiceUnavailable)
		}
	})
	server := &http.Server{Addr: address, Handler: mux}
	closed := make(chan error, 1)
	go func() {
		<-ended.Done()
		// Clients stop coming once they have heard that this pod ends; until then it serves.
		time.Sleep(5 * time.Second)
		patience, stop := context.WithTimeout(context.Background(), 10*time.Second)
		defer stop()
		closed <- server.Shutdown(patience)
	}()
	if err := server.ListenAndServe(); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return <-closed
}

func echo(address string) error {
	listener, err := net.Listen("tcp", address)
	if err != nil {
		return err
	}
	for {
		connection, err := listener.Accept()
		if err != nil {
			return err
		}
		go func() {
			defer connection.Close()
			io.Copy(connection, connection)
		}()
	}
}

// client makes a connection for each request.
func client() *http.Client {
	dialer := net.Dialer{Timeout: 5 * time.Second}
	transport := &http.Transport{DisableKeepAlives: true, DialContext: dialer.DialContext}
	return &http.Client{Transport: transport, Timeout: 10 * time.Second}
}

func ask(client *http.Client, url string) (string, error) {
	request, err := http.NewRequest(http.MethodGet, url, nil)
	if err != nil {
		return "", err
	}
	request.Header.Set("Canary", canary)
	response, err := client.Do(request)
	if err != nil {
		return "", err
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	if err == nil && response.StatusCode != http.StatusOK {
		err = fmt.Errorf("status %d", response.StatusCode)
	}
	return string(body), err
}

func get(url string) error {
	body, err := ask(client(), url)
	fmt.Print(body)
	return err
}

// outcome is what a load prints.
type outcome struct {
	Ok     int            `json:"ok"`
	Failed int            `json:"failed"`
	Errors map[string]int `json:"errors"`
	// Answers of each host.
	Hosts map[string]int `json:"hosts,omitempty"`
	// Milliseconds.
	Median float64 `json:"median,omitempty"`
	P99    float64 `json:"p99,omitempty"`
	lock   sync.Mutex
	times  []float64
}

func (o *outcome) fail(at time.Duration, err error) {
	o.lock.Lock()
	defer o.lock.Unlock()
	o.Failed++
	o.Errors[fmt.Sprintf("after %d s: %v", int(at.Seconds()), err)]++
}

func (o *outcome) print() error {
	if slices.Sort(o.times); len(o.times) > 0 {
		o.Median, o.P99 = o.times[len(o.times)/2], o.times[len(o.times)*99/100]
	}
	return json.NewEncoder(os.Stdout).Encode(o)
}

func load(ended context.Context, url string, rate, seconds int) error {
	out := outcome{Errors: map[string]int{}, Hosts: map[string]int{}}
	client, start := client(), time.Now()
	var running sync.WaitGroup
	ticks := time.NewTicker(time.Second / time.Duration(rate))
	for time.Since(start) < time.Duration(seconds)*time.Second && ended.Err() == nil {
		<-ticks.C
		running.Go(func() {
			began := time.Now()
			body, err := ask(client, url)
			if err != nil {
				out.fail(began.Sub(start), err)
				return
			}
			out.lock.Lock()
			defer out.lock.Unlock()
			out.Ok++
			out.times = append(out.times, float64(time.Since(began).Microseconds())/1000)
			host, _, _ := strings.Cut(body, " ")
			out.Hosts[host]++
		})
	}
	running.Wait()
	return out.print()
}

func hold(ended context.Context, address string, count, seconds int) error {
	out := outcome{Errors: map[string]int{}}
	start := time.Now()
	var running sync.WaitGroup
	var good atomic.Int64
	for range count {
		running.Go(func() {
			connection, err := net.DialTimeout("tcp", address, 10*time.Second)
			if err != nil {
				out.fail(time.Since(start), err)
				return
			}
			defer connection.Close()
			reader := bufio.NewReader(connection)
			for i := 0; time.Since(start) < time.Duration(seconds)*time.Second && ended.Err() == nil; i++ {
				connection.SetDeadline(time.Now().Add(10 * time.Second))
				fmt.Fprintf(connection, "%s %d\n", canary, i)
				if _, err := reader.ReadString('\n'); err != nil {
					out.fail(time.Since(start), err)
					return
				}
				time.Sleep(time.Second)
			}
			good.Add(1)
		})
	}
	running.Wait()
	out.Ok = int(good.Load())
	return out.print()
}
