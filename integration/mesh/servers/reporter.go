// Writes down each request as Go understood it, a JSON object on a line of the file REPORTS. It speaks HTTP/1 and HTTP/2 on PORT.
package main

import (
	"encoding/json"
	"io"
	"net/http"
	"os"
	"strings"
	"sync"
)

var (
	reports *os.File
	lock    sync.Mutex
)

// latin keeps each byte as a character.
func latin(text string) string {
	runes := make([]rune, len(text))
	for at := range len(text) {
		runes[at] = rune(text[at])
	}
	return string(runes)
}

func report(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(r.Body)
	if err != nil {
		return
	}
	target, query, _ := strings.Cut(r.RequestURI, "?")
	headers := [][]string{}
	for name, values := range r.Header {
		for _, value := range values {
			headers = append(headers, []string{strings.ToLower(name), latin(value)})
		}
	}
	line, _ := json.Marshal(map[string]any{
		"method": r.Method, "target": latin(target), "query": latin(query), "paths": []string{latin(r.URL.Path)},
		"hosts": []string{latin(r.Host)}, "headers": headers, "body": latin(string(body)),
	})
	lock.Lock()
	reports.Write(append(line, '\n'))
	lock.Unlock()
	io.WriteString(w, "seen")
}

func main() {
	reports, _ = os.OpenFile(os.Getenv("REPORTS"), os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o600)
	protocols := new(http.Protocols)
	protocols.SetHTTP1(true)
	protocols.SetUnencryptedHTTP2(true)
	server := http.Server{Addr: "127.0.0.1:" + os.Getenv("PORT"), Handler: http.HandlerFunc(report), Protocols: protocols}
	panic(server.ListenAndServe())
}
