// Stands in for Grafana, whose program cannot be had where the tests run: it listens where Grafana would, answers its
// health check and Prometheus' scrapes, and tells what it was given to provision. It draws nothing.
package main

import (
	"encoding/json"
	"fmt"
	"log"
	"net/http"
	"os"
	"path/filepath"
	"time"
)

const provisioning = "/etc/grafana"

func main() {
	began := time.Now()
	address := os.Getenv("GF_SERVER_HTTP_ADDR") + ":" + os.Getenv("GF_SERVER_HTTP_PORT")
	http.HandleFunc("/api/health", func(answer http.ResponseWriter, _ *http.Request) {
		tell(answer, map[string]any{"database": "none", "version": "a stand-in, not Grafana"})
	})
	http.HandleFunc("/metrics", func(answer http.ResponseWriter, _ *http.Request) {
		answer.Header().Set("Content-Type", "text/plain; version=0.0.4")
		fmt.Fprintf(answer, "process_start_time_seconds %d\n", began.Unix())
		fmt.Fprintln(answer, `grafana_stand_in_info{told="what nobody asked for is not kept"} 1`)
	})
	http.HandleFunc("/", func(answer http.ResponseWriter, asked *http.Request) {
		files, _ := filepath.Glob(provisioning + "/dashboards/*.json")
		tell(answer, map[string]any{
			"stand_in":      "This is not Grafana, which did not run.",
			"dashboards":    files,
			"authorization": asked.Header.Get("Authorization"), // Traefik must not hand it on
		})
	})
	log.Printf("a stand-in for Grafana listens on %s", address)
	log.Fatal(http.ListenAndServe(address, nil))
}

func tell(answer http.ResponseWriter, document map[string]any) {
	answer.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(answer).Encode(document)
}
