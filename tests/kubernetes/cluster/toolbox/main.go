// What a pod runs in the tests of the cluster itself: `toolbox serve ADDRESS` answers every HTTP request with its host's
// name and the client's address, `toolbox get URL` prints an answer and how long connecting took, `toolbox sleep` waits.
package main

import (
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"time"
)

func main() {
	if len(os.Args) < 2 {
		fail("serve, get or sleep?")
	}
	switch os.Args[1] {
	case "serve":
		name, _ := os.Hostname()
		fail(http.ListenAndServe(os.Args[2], http.HandlerFunc(func(answer http.ResponseWriter, request *http.Request) {
			host, _, _ := net.SplitHostPort(request.RemoteAddr)
			fmt.Fprintf(answer, "%s answers %s\n", name, host)
		})))
	case "get":
		get(os.Args[2])
	case "sleep":
		time.Sleep(time.Hour * 24 * 365)
	default:
		fail("serve, get or sleep?")
	}
}

func get(url string) {
	var took time.Duration
	dial := func(network, address string) (net.Conn, error) {
		start := time.Now()
		connection, err := net.DialTimeout(network, address, 3*time.Second)
		took = time.Since(start)
		return connection, err
	}
	transport := &http.Transport{Dial: dial, TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}
	answer, err := (&http.Client{Transport: transport, Timeout: 5 * time.Second}).Get(url)
	if err != nil {
		fail(err)
	}
	fmt.Printf("%.3f\n", took.Seconds())
	if _, err := io.Copy(os.Stdout, answer.Body); err != nil {
		fail(err)
	}
}

func fail(reason any) {
	fmt.Fprintln(os.Stderr, reason)
	os.Exit(1)
}
