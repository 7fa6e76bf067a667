// Asks for each path that stands on a line of standard input, and says what came of it, a JSON object on a line.
package main

import (
	"bufio"
	"encoding/json"
	"io"
	"net/http"
	"os"
	"strings"
	"time"
)

// latin keeps each byte as a character.
func latin(text string) string {
	runes := make([]rune, len(text))
	for at := range len(text) {
		runes[at] = rune(text[at])
	}
	return string(runes)
}

func main() {
	never := func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }
	client := http.Client{Transport: &http.Transport{DisableKeepAlives: true, DisableCompression: true}, CheckRedirect: never, Timeout: 10 * time.Second}
	lines := bufio.NewScanner(os.Stdin)
	for lines.Scan() {
		told := map[string]any{"path": lines.Text(), "status": nil, "headers": [][]string{}, "body": "", "complete": false}
		if response, err := client.Get("http://127.0.0.1:" + os.Args[1] + lines.Text()); err == nil {
			body, err := io.ReadAll(response.Body)
			headers := [][]string{}
			for name, values := range response.Header {
				for _, value := range values {
					headers = append(headers, []string{strings.ToLower(name), latin(value)})
				}
			}
			told["status"], told["headers"], told["body"], told["complete"] = response.StatusCode, headers, latin(string(body)), err == nil
		}
		line, _ := json.Marshal(told)
		os.Stdout.Write(append(line, '\n'))
	}
}
