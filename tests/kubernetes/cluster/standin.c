/* Stands in for the program of an operator pod: behaves as the name of its pod says (tests/contract/runtime.py). */
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

static void end(int number) { (void)number; _exit(0); }

int main(void) {
    static char boot[65536];
    FILE *file = fopen("/run/nomad/boot/boot", "r");
    if (file == NULL) return 1;
    boot[fread(boot, 1, sizeof boot - 1, file)] = 0;
    fclose(file);
    if (strstr(boot, "-exit3-")) return 3;
    if (strstr(boot, "-stubborn-")) puts("deaf");
    else signal(SIGTERM, end);
    if (strstr(boot, "-chatty-")) for (int n = 0; n < 5; n++) printf("line %d\n", n);
    for (int n = 0; strstr(boot, "-ticking-"); n++) {
        printf("tick %d\n", n);
        fflush(stdout);
        usleep(100000);
    }
    fflush(stdout);
    for (;;) pause();
}
