/* What this machine multiplies and adds at most, from registers to registers: 12 independent chains of one instruction
 * per thread. Prints a line for each number of threads that is asked for: the threads, then fp32, bf16 and int8 in
 * GMAC/s in the best turn, then the same in the middle one, which falls when others take the processor; 0 where it has
 * no such instruction.  cc -O2 -pthread peak.c -o peak && ./peak THREADS...  */
#include <immintrin.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#define CHAINS 12
#define PASSES 4000000L
#define TURNS 9
#define WIDE __attribute__((target("avx512f,avx512bw,avx512vnni,avx512bf16")))
#define EACH(DO) DO(0) DO(1) DO(2) DO(3) DO(4) DO(5) DO(6) DO(7) DO(8) DO(9) DO(10) DO(11)
#define CHAIN(NAME, INSTRUCTION)                                                                      \
    WIDE static void *NAME(void *result) {                                                            \
        __m512 sum[CHAINS], x = _mm512_set1_ps(1e-9f), y = x;                                          \
        _Pragma("GCC unroll 12") for (int i = 0; i < CHAINS; i++) sum[i] = _mm512_setzero_ps();       \
        for (long pass = 0; pass < PASSES; pass++) {                                                   \
            EACH(INSTRUCTION)                                                                         \
        }                                                                                             \
        _Pragma("GCC unroll 12") for (int i = 1; i < CHAINS; i++) sum[0] = _mm512_add_ps(sum[0], sum[i]); \
        *(float *)result = _mm512_reduce_add_ps(sum[0]);                                              \
        return NULL;                                                                                  \
    }
#define FP32(i) __asm__ volatile("vfmadd231ps %1, %2, %0" : "+v"(sum[i]) : "v"(x), "v"(y));
#define BF16(i) __asm__ volatile("vdpbf16ps %1, %2, %0" : "+v"(sum[i]) : "v"(x), "v"(y));
#define INT8(i) __asm__ volatile("vpdpbusd %1, %2, %0" : "+v"(sum[i]) : "v"(x), "v"(y));
CHAIN(fp32, FP32)
CHAIN(bf16, BF16)
CHAIN(int8, INT8)

static double seconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec + 1e-9 * now.tv_nsec;
}

struct rate {
    double best, middle;
};

static int ascending(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static struct rate gmacs(void *(*chain)(void *), int products, int threads) {
    pthread_t *thread = malloc(threads * sizeof *thread);
    float *result = malloc(threads * sizeof *result);
    double taken[TURNS], work = 1e-9 * products * CHAINS * PASSES * threads;
    for (int turn = 0; turn < TURNS; turn++) {
        double start = seconds();
        for (int i = 0; i < threads; i++) pthread_create(&thread[i], NULL, chain, &result[i]);
        for (int i = 0; i < threads; i++) pthread_join(thread[i], NULL);
        taken[turn] = seconds() - start;
    }
    free(thread);
    free(result);
    qsort(taken, TURNS, sizeof *taken, ascending);
    return (struct rate){work / taken[0], work / taken[TURNS / 2]};
}

int main(int count, char **words) {
    struct rate none = {0, 0};
    __builtin_cpu_init();
    int wide = __builtin_cpu_supports("avx512f");
    for (int k = 1; k < count; k++) {
        int threads = atoi(words[k]);
        if (threads < 1) return 2;
        struct rate f = wide ? gmacs(fp32, 16, threads) : none;
        struct rate b = wide && __builtin_cpu_supports("avx512bf16") ? gmacs(bf16, 32, threads) : none;
        struct rate i = wide && __builtin_cpu_supports("avx512vnni") ? gmacs(int8, 64, threads) : none;
        printf("%d %.1f %.1f %.1f %.1f %.1f %.1f\n", threads, f.best, b.best, i.best, f.middle, b.middle, i.middle);
    }
    return 0;
}
