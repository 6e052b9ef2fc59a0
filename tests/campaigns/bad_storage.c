/* A bad disk, a wrong clock: loaded into a process with LD_PRELOAD, see campaign_storage.py.

   FAULT_FOLDERS   the folders that are on the bad disk, with colons between them
   FAULT_EVERY     one read (or opening for reading) there in so many fails with EIO
   FAULT_COUNT     a byte is added to this file per fault
   FAULT_READONLY  while this file exists, writing there fails with EROFS
   FAULT_CLOCK     the time of day jumps by up to so many seconds, at each look */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#define REAL(result, name, ...)                                      \
  static result (*real_##name)(__VA_ARGS__);                         \
  if (!real_##name) real_##name = dlsym(RTLD_NEXT, #name);

static atomic_uint_fast64_t calls;
static atomic_char bad[65536]; /* descriptors of files on the bad disk */

static long number(const char *name) {
  const char *text = getenv(name);
  return text ? atol(text) : 0;
}

static uint_fast64_t draw(void) { /* splitmix64 of the number of the call, other in each process */
  uint_fast64_t x = (atomic_fetch_add(&calls, 1) + ((uint_fast64_t)getpid() << 32)) * 0x9E3779B97F4A7C15u;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
  return x ^ (x >> 31);
}

static void count(void) {
  REAL(int, open, const char *, int, ...);
  REAL(ssize_t, write, int, const void *, size_t);
  const char *file = getenv("FAULT_COUNT");
  int descriptor = file ? real_open(file, O_WRONLY | O_APPEND | O_CREAT, 0666) : -1;
  if (descriptor >= 0) {
    real_write(descriptor, "x", 1);
    close(descriptor);
  }
}

static int is_bad(const char *path) {
  const char *folders = getenv("FAULT_FOLDERS");
  while (folders && *folders) {
    size_t length = strcspn(folders, ":");
    if (!strncmp(path, folders, length) && (path[length] == '/' || !path[length])) return 1;
    folders += length + (folders[length] == ':');
  }
  return 0;
}

static int fails(void) {
  long every = number("FAULT_EVERY");
  if (!every || draw() % every) return 0;
  count();
  errno = EIO;
  return 1;
}

static int is_readonly(void) {
  const char *file = getenv("FAULT_READONLY");
  if (!file || access(file, F_OK)) return 0;
  count();
  errno = EROFS;
  return 1;
}

static int open_checked(int descriptor, const char *path) {
  if (descriptor >= 0 && descriptor < 65536) bad[descriptor] = is_bad(path);
  return descriptor;
}

#define OPEN(name)                                                   \
  int name(const char *path, int flags, ...) {                       \
    REAL(int, name, const char *, int, ...);                         \
    va_list list;                                                    \
    va_start(list, flags);                                           \
    int mode = flags & O_CREAT ? va_arg(list, int) : 0;              \
    va_end(list);                                                    \
    int writes = (flags & O_ACCMODE) != O_RDONLY;                    \
    if (is_bad(path) && (writes ? is_readonly() : !(flags & O_DIRECTORY) && fails())) return -1; \
    return open_checked(real_##name(path, flags, mode), path);       \
  }
OPEN(open)
OPEN(open64)

#define OPENAT(name)                                                 \
  int name(int folder, const char *path, int flags, ...) {           \
    REAL(int, name, int, const char *, int, ...);                    \
    va_list list;                                                    \
    va_start(list, flags);                                           \
    int mode = flags & O_CREAT ? va_arg(list, int) : 0;              \
    va_end(list);                                                    \
    int writes = (flags & O_ACCMODE) != O_RDONLY;                    \
    if (is_bad(path) && (writes ? is_readonly() : !(flags & O_DIRECTORY) && fails())) return -1; \
    return open_checked(real_##name(folder, path, flags, mode), path); \
  }
OPENAT(openat)
OPENAT(openat64)

#define ON(descriptor) ((descriptor) >= 0 && (descriptor) < 65536 && bad[descriptor])

ssize_t read(int descriptor, void *to, size_t size) {
  REAL(ssize_t, read, int, void *, size_t);
  return ON(descriptor) && fails() ? -1 : real_read(descriptor, to, size);
}
ssize_t readv(int descriptor, const struct iovec *to, int pieces) {
  REAL(ssize_t, readv, int, const struct iovec *, int);
  return ON(descriptor) && fails() ? -1 : real_readv(descriptor, to, pieces);
}
ssize_t pread64(int descriptor, void *to, size_t size, off64_t at) {
  REAL(ssize_t, pread64, int, void *, size_t, off64_t);
  return ON(descriptor) && fails() ? -1 : real_pread64(descriptor, to, size, at);
}
ssize_t write(int descriptor, const void *from, size_t size) {
  REAL(ssize_t, write, int, const void *, size_t);
  return ON(descriptor) && is_readonly() ? -1 : real_write(descriptor, from, size);
}
int close(int descriptor) {
  REAL(int, close, int);
  if (descriptor >= 0 && descriptor < 65536) bad[descriptor] = 0;
  return real_close(descriptor);
}
int rename(const char *from, const char *to) {
  REAL(int, rename, const char *, const char *);
  return is_bad(to) && is_readonly() ? -1 : real_rename(from, to);
}
int unlink(const char *path) {
  REAL(int, unlink, const char *);
  return is_bad(path) && is_readonly() ? -1 : real_unlink(path);
}
int mkdir(const char *path, mode_t mode) {
  REAL(int, mkdir, const char *, mode_t);
  return is_bad(path) && is_readonly() ? -1 : real_mkdir(path, mode);
}

int clock_gettime(clockid_t clock, struct timespec *time) {
  REAL(int, clock_gettime, clockid_t, struct timespec *);
  int result = real_clock_gettime(clock, time);
  long most = number("FAULT_CLOCK");
  if (most && clock == CLOCK_REALTIME && !result) time->tv_sec += (long)(draw() % (2 * most)) - most;
  return result;
}
