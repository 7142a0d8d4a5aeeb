/* Resolves each name given, as any program does, and prints its addresses in order on one line. */
#include <arpa/inet.h>
#include <netdb.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>

static int compare(const void *a, const void *b) { return strcmp(a, b); }

int main(int count, char **names) {
    for (int i = 1; i < count; i++) {
        struct addrinfo hints = {.ai_family = AF_UNSPEC, .ai_socktype = SOCK_STREAM}, *all = NULL;
        char texts[64][INET6_ADDRSTRLEN];
        int found = 0, code = getaddrinfo(names[i], "80", &hints, &all);
        printf("%s", names[i]);
        for (struct addrinfo *one = all; one && found < 64; one = one->ai_next, found++) {
            const void *ip = one->ai_family == AF_INET ? (void *)&((struct sockaddr_in *)one->ai_addr)->sin_addr
                                                       : (void *)&((struct sockaddr_in6 *)one->ai_addr)->sin6_addr;
            inet_ntop(one->ai_family, ip, texts[found], sizeof texts[found]);
        }
        qsort(texts, found, sizeof texts[0], compare);
        for (int at = 0; at < found; at++) printf(" %s", texts[at]);
        printf(code ? " none\n" : "\n");
        if (all) freeaddrinfo(all);
    }
}
